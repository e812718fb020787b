"""Linear attention in which every query sees every key alike: out = scale q (k^T v).

One pass over k and v finds the state, and one over q reads it: a pass whose own keys are zeros.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.hopper.linear_gradients import shared
from pallas_kernels.hopper.linear_plan import Scan
from pallas_kernels.hopper.linear_scan import Entering, linear_scan
from pallas_kernels.hopper.linear_split import segments, states_of_all
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem, LinearResults


def full_forward(p: LinearProblem, a: LinearArrays, *, interpret: _compat.Interpret = None) -> LinearResults:
    """out [B, Sq, H, Dv] in the input dtype."""
    return LinearResults(_read(p, a.q, _summed(p, a.k, a.v, interpret), interpret))


def full_gradients(
    p: LinearProblem, a: LinearArrays, d_out: jax.Array, *, interpret: _compat.Interpret = None
) -> LinearGradients:
    """Gradients of q, k and v."""
    read = functools.partial(_read, p, interpret=interpret)
    kv, d_kv = _summed(p, a.k, a.v, interpret), _summed(p, a.q, d_out, interpret)
    return LinearGradients(
        q=shared(read(d_out, jnp.swapaxes(kv, 2, 3)), a.q),
        k=shared(read(a.v, jnp.swapaxes(d_kv, 2, 3)), a.k),
        v=shared(read(a.k, d_kv), a.v),
    )


def _summed(p: LinearProblem, k: jax.Array, v: jax.Array, interpret: _compat.Interpret) -> jax.Array:
    """The sum of k v^T, float32 [B, H, D, Dv]."""
    return states_of_all(_scan(p, k.shape[1], k.shape[3], v.shape[3]), k, v, interpret=interpret)


def _read(p: LinearProblem, q: jax.Array, state: jax.Array, interpret: _compat.Interpret) -> jax.Array:
    """scale q state, [B, S, H, Dv]."""
    B, S, _, D = q.shape
    scan = _scan(p, S, D, state.shape[3])
    nothing = (jnp.zeros((B, S, 1, n), q.dtype) for n in (D, state.shape[3]))
    entering = Entering(segments(scan), state)
    return linear_scan(scan, q, *nothing, entering=entering, interpret=interpret).out


def _scan(p: LinearProblem, S: int, D: int, Dv: int) -> Scan:
    return Scan(B=p.B, H=p.H, S=S, D=D, Dv=Dv, dtype=p.dtype, scale=p.scale)

"""Causal linear attention and its gradients, all by `linear_scan` with exchanged operands.

With M the decays, out = scale (M * q k^T) v has

    dq = scale (M * dO v^T) k    dk = scale (M * dO v^T)^T q    dv = scale (M * q k^T)^T dO

dq is a pass of (dO, v, k) in the direction of the forward, whose state is that of the forward transposed; dk
and dv are adjoint passes of (v, dO, q) and (k, q, dO) against it, whose state is the cotangent of the
forward's. Nothing of the forward is stored.

The gradient of a log decay sums w dw over the pairs that it lies between. Within a chunk that is a running sum
of q . dq - k . dk: the pairs on one side of the token cancel to the last bit, as both passes round alike. Left
over are the pairs through a state: those of the chunk's keys, and total <S, dS'>, those that span the chunk: the
pass of dq writes S, and that of dk reads it and multiplies.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels.hopper.linear_plan import Scan
from pallas_kernels.hopper.linear_scan import ScanResults, linear_scan
from pallas_kernels.hopper.linear_split import entering_states, segments
from pallas_kernels.parts import decay
from pallas_kernels.parts.decay import CHUNK
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem, LinearResults


def linear_forward(
    p: LinearProblem, a: LinearArrays, *, diagonal: bool = True, interpret: _compat.Interpret = None
) -> LinearResults:
    """out [B, S, H, Dv] in the input dtype and kv [B, H, D, Dv] in float32."""
    scan = scan_of(p, diagonal)
    entering = entering_states(scan, segments(scan), a.k, a.v, a.log_decay, a.kv, interpret=interpret)
    found = linear_scan(scan, a.q, a.k, a.v, a.log_decay, entering, interpret=interpret)
    return LinearResults(found.out, kv=found.final)


def linear_gradients(
    p: LinearProblem, a: LinearArrays, d_out, d_kv, *, diagonal: bool = True, interpret: _compat.Interpret = None
) -> LinearGradients:
    """Gradients of q, k, v, log_decay and kv, from the cotangents of out and of the final state."""
    straight = scan_of(p, diagonal)
    swapped = dataclasses.replace(straight, D=p.Dv, Dv=p.D)
    adjoint = functools.partial(dataclasses.replace, later=p.before, adjoint=True)
    partners = (a.q, a.k) if p.decay_gradient else (None, None)
    scan = functools.partial(linear_scan, interpret=interpret)
    entering = functools.partial(entering_states, n=segments(straight), log_decay=a.log_decay, interpret=interpret)
    # What enters an adjoint pass leaves it times scale.
    d_end = None if d_kv is None else d_kv / p.scale
    states = entering(swapped, k=a.v, v=a.k, initial=_transposed(a.kv))
    cotangents = entering(adjoint(straight), k=a.q, v=d_out, initial=d_end)
    turned = cotangents._replace(initial=_transposed(cotangents.initial), own=_transposed(cotangents.own))
    dq = scan(swapped, d_out, a.v, a.k, a.log_decay, states, partners[0])
    dk = scan(adjoint(swapped), a.v, d_out, a.q, a.log_decay, turned, partners[1], dq.states)
    dv = scan(adjoint(straight), a.k, a.q, d_out, a.log_decay, cotangents)
    return LinearGradients(
        q=shared(dq.out, a.q),
        k=shared(dk.out, a.k),
        v=shared(dv.out, a.v),
        log_decay=_decay_gradient(p, a.log_decay, dq, dk) if p.decay_gradient else None,
        kv=dv.final * p.scale if p.initial_state else None,
    )


def scan_of(p: LinearProblem, diagonal: bool = True) -> Scan:
    return Scan(B=p.B, H=p.H, S=p.Sq, D=p.D, Dv=p.Dv, dtype=p.dtype, scale=p.scale, later=p.after, diagonal=diagonal)


def shared(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """gradient [B, S, H, D] summed over the heads that share one of x, in the dtype of x."""
    B, S, heads, D = x.shape
    if gradient.shape[2] != heads:
        gradient = gradient.reshape(B, S, heads, -1, D).sum(axis=3, dtype=jnp.float32)
    return gradient.astype(x.dtype)


def summed_to(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """gradient summed over the axes on which x broadcasts, in x's dtype."""
    axes = tuple(axis for axis, n in enumerate(x.shape) if n != gradient.shape[axis])
    return gradient.sum(axis=axes, keepdims=True).astype(x.dtype)


def _transposed(state: jax.Array | None) -> jax.Array | None:
    return None if state is None else jnp.swapaxes(state, 2, 3)


def _decay_gradient(p: LinearProblem, log_decay, of_q: ScanResults, of_k: ScanResults) -> jax.Array:
    """The gradient of log_decay, in its shape and dtype."""
    sums = decay.sums(log_decay, p.Sq, suffix=p.after)
    total = sums.reshape(*sums.shape[:2], -1, CHUNK)[..., 0 if p.after else -1]
    assert of_q.dots is not None
    assert of_k.dots is not None
    dots, through_state, products = of_k.dots
    spanning = p.scale * jnp.exp2(total) * products.sum(axis=-1)
    within = lax.cumsum(of_q.dots[0] - dots, axis=3, reverse=p.before)
    dg = within + (through_state.sum(axis=-1) + spanning)[..., None]
    return summed_to(log_decay, jnp.moveaxis(dg.reshape(p.B, p.H, -1)[:, :, : p.Sq], 1, 2))

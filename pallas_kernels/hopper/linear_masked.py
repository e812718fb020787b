"""Masked linear attention and its gradients: a kernel for out, one for dq, dk and dv, one for the mask's."""

from __future__ import annotations

import functools

import jax

from pallas_kernels import _compat
from pallas_kernels.hopper.linear_gradients import shared
from pallas_kernels.hopper.linear_masked_backward import linear_masked_backward
from pallas_kernels.hopper.linear_masked_forward import linear_masked_forward
from pallas_kernels.hopper.linear_masked_gradient import linear_masked_gradient
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem, LinearResults


def forward(p: LinearProblem, a: LinearArrays, *, interpret: _compat.Interpret = None) -> LinearResults:
    """out [B, Sq, H, Dv] in the input dtype."""
    return LinearResults(linear_masked_forward(p, a, interpret=interpret))


@functools.partial(jax.jit, static_argnames=("p", "interpret"))
def backward(
    p: LinearProblem, a: LinearArrays, d_out: jax.Array, *, interpret: _compat.Interpret = None
) -> LinearGradients:
    """Gradients of q, k, v and, if wanted, the mask."""
    dq, dk, dv = linear_masked_backward(p, a, d_out, interpret=interpret)
    d_mask = linear_masked_gradient(p, a, d_out, interpret=interpret) if p.mask_gradient else None
    return LinearGradients(q=shared(dq, a.q), k=shared(dk, a.k), v=shared(dv, a.v), mask=d_mask)

"""The whole backward: row statistics, the fused kernel, and dQ out of its float32 buffer."""

from __future__ import annotations

import functools

import jax

from pallas_kernels import _compat
from pallas_kernels.hopper import attention_backward
from pallas_kernels.hopper.attention_delta import attention_delta
from pallas_kernels.hopper.attention_dq import attention_dq
from pallas_kernels.problem import AttentionArrays, AttentionGradients, AttentionProblem


@functools.partial(jax.jit, static_argnames=("p", "interpret"))
def attention_gradients(
    p: AttentionProblem, a: AttentionArrays, out, lse, d_out, d_lse, *, interpret: _compat.Interpret = None
) -> AttentionGradients:
    """Gradients of q, k and v from both outputs and their cotangents."""
    plan = attention_backward.make_plan(p, interpret)
    lse2, delta, zeros = attention_delta(plan, out, lse, d_out, d_lse)
    dq = _compat.accumulator(zeros)
    dk, dv = attention_backward.attention_backward(p, a, d_out, lse2, delta, dq, interpret=interpret)
    return AttentionGradients(q=attention_dq(plan, dq[...]), k=dk, v=dv)

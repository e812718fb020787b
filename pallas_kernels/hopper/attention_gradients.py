"""The whole backward: row statistics, the fused kernel, and dQ out of its float32 buffer or by a kernel of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.hopper import attention_backward
from pallas_kernels.hopper.attention_backward_q import attention_backward_q
from pallas_kernels.hopper.attention_backward_roles import attention_backward_roles
from pallas_kernels.hopper.attention_delta import attention_delta
from pallas_kernels.hopper.attention_dq import attention_dq
from pallas_kernels.parts import bias
from pallas_kernels.parts.softmax import LOG2E
from pallas_kernels.problem import AttentionArrays, AttentionGradients, AttentionProblem


@functools.partial(jax.jit, static_argnames=("p", "interpret"))
def attention_gradients(
    p: AttentionProblem, a: AttentionArrays, out, lse, d_out, d_lse, *, interpret: _compat.Interpret = None
) -> AttentionGradients:
    """Gradients of q, k, v, bias and sinks from both outputs and their cotangents."""
    plan = attention_backward.make_plan(p, interpret)
    lse2, delta, zeros = attention_delta(plan, out, lse, d_out, d_lse)
    accumulator = None if zeros is None else _compat.accumulator(zeros)
    zeros = bias.zeros(p, plan.tile.block_q, plan.tile.block_kv)
    d_bias = None if zeros is None else _compat.accumulator(zeros)
    backward = attention_backward_roles if plan.tile.roles else attention_backward.attention_backward
    dk, dv = backward(p, a, d_out, lse2, delta, accumulator, d_bias, interpret=interpret)
    if accumulator is None:
        dq = attention_backward_q(p, a, d_out, lse2, delta, interpret=interpret)
    else:
        dq = attention_dq(plan, accumulator[...])
    d_sinks = None if a.sinks is None else _sink_gradient(p, a.sinks, lse2, delta)
    d_bias = bias.gradient(p, None if d_bias is None else d_bias[...], a, lse2, delta, d_lse)
    return AttentionGradients(q=dq, k=dk, v=dv, bias=d_bias, sinks=d_sinks)


def _sink_gradient(p: AttentionProblem, sinks, lse2, delta) -> jax.Array:
    """A sink is one more key of weight exp(sink - lse) and value 0, so its dS is -weight delta."""
    weight = jnp.exp2(sinks[:, :, None].astype(jnp.float32) * LOG2E - lse2)
    d_sinks = -(weight * delta)[:, :, : p.Sq].sum(axis=-1)
    if sinks.shape[0] == 1:
        d_sinks = d_sinks.sum(axis=0, keepdims=True)
    return d_sinks.astype(sinks.dtype)

"""The whole backward: row statistics, the fused kernel, and dQ out of its float32 buffer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.hopper import attention_backward
from pallas_kernels.hopper.attention_dq import attention_dq
from pallas_kernels.parts.softmax import LOG2E
from pallas_kernels.problem import AttentionArrays, AttentionGradients, AttentionProblem


@functools.partial(jax.jit, static_argnames=("p", "interpret"))
def attention_gradients(
    p: AttentionProblem, a: AttentionArrays, out, lse, d_out, d_lse, *, interpret: _compat.Interpret = None
) -> AttentionGradients:
    plan = attention_backward.make_plan(p, interpret)
    lse2, delta = _row_statistics(plan, out, lse, d_out, d_lse)
    dq = _compat.accumulator(jnp.zeros(plan.dq_shape, jnp.float32))
    dk, dv = attention_backward.attention_backward(p, a, d_out, lse2, delta, dq, interpret=interpret)
    return AttentionGradients(q=attention_dq(plan, dq[...]), k=dk, v=dv)


def _row_statistics(plan: attention_backward.Plan, out, lse, d_out, d_lse) -> tuple[jax.Array, jax.Array]:
    """lse in base 2 and delta = rowsum(dO O) - dlse, float32 [B, H, Sq padded to whole blocks].

    An lse of +inf makes the probabilities of a row zero: rows that see no key, and rows of padding.
    """
    delta = jnp.einsum("bihv,bihv->bhi", d_out, out, preferred_element_type=jnp.float32) - d_lse
    lse2 = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    tail = ((0, 0), (0, 0), (0, plan.query_blocks * plan.tile.block_q - plan.problem.Sq))
    return jnp.pad(lse2, tail, constant_values=jnp.inf), jnp.pad(delta, tail)

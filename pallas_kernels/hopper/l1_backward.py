"""The whole backward of L1 attention: row statistics, then dQ, then dK and dV. Bit for bit the same every run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.hopper.l1_backward_k import l1_backward_k
from pallas_kernels.hopper.l1_backward_q import l1_backward_q
from pallas_kernels.parts.softmax import LOG2E
from pallas_kernels.problem import AttentionArrays, AttentionGradients, L1Problem


@functools.partial(jax.jit, static_argnames=("p", "interpret"))
def l1_backward(
    p: L1Problem, a: AttentionArrays, out, lse, d_out, d_lse, *, interpret: _compat.Interpret = None
) -> AttentionGradients:
    """Gradients of q, k, v and sinks from both outputs and their cotangents."""
    products = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    delta = jnp.swapaxes(products.sum(axis=-1), 1, 2) - d_lse
    lse2 = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)  # a row that sees no key has no gradient
    dq = l1_backward_q(p, a, d_out, lse2, delta, interpret=interpret)
    dk, dv = l1_backward_k(p, a, d_out, lse2, delta, interpret=interpret)
    d_sinks = None
    if a.sinks is not None:  # one more key, of weight exp(sink - lse) and value 0
        weight = jnp.exp2(a.sinks[:, :, None].astype(jnp.float32) * LOG2E - lse2)
        d_sinks = -(weight * delta).sum(axis=-1)
        d_sinks = d_sinks.sum(axis=0, keepdims=True) if a.sinks.shape[0] == 1 else d_sinks
        d_sinks = d_sinks.astype(a.sinks.dtype)
    dtype = a.q.dtype
    return AttentionGradients(q=dq.astype(dtype), k=dk.astype(dtype), v=dv.astype(dtype), sinks=d_sinks)

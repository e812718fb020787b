"""Linear attention in plain JAX, for any device and every feature: chunked, unmasked, or in tiles under a mask.

Normalizing is one more column of ones in v: it sums the weights, and its state is z.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jflash.xla import linear_causal, linear_full, linear_masked, linear_thin_mask
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem, LinearResults


def forward(p: LinearProblem, a: LinearArrays) -> LinearResults:
    """out in the input dtype; norm and the state in float32 or wider."""
    if not p.normalize:
        out, kv = _forward(p, a, a.q.dtype)
        return LinearResults(out, kv=kv)
    wide = jnp.promote_types(a.q.dtype, jnp.float32)
    total, state = _forward(*_with_ones(p, a), wide)
    norm = total[..., -1]
    some = norm != 0
    out = jnp.where(some[..., None], total[..., :-1] / jnp.where(some, norm, 1)[..., None], 0)
    kv, z = (None, None) if state is None else (state[..., :-1], state[..., -1])
    return LinearResults(out.astype(a.q.dtype), norm, kv, z)


def backward(p: LinearProblem, a: LinearArrays, out, norm, d_out, d_kv, d_z) -> LinearGradients:
    """Gradients of every differentiable operand, from out and norm of the forward and cotangents of the results."""
    if not p.normalize:
        return _backward(p, a, d_out, d_kv)
    some = norm[..., None] != 0
    d_total = jnp.where(some, d_out.astype(norm.dtype) / jnp.where(some, norm[..., None], 1), 0)
    d_norm = -(d_total * out.astype(norm.dtype)).sum(axis=-1, keepdims=True)
    d_total = jnp.concatenate([d_total, d_norm], axis=-1)
    d_state = None if d_kv is None else jnp.concatenate([d_kv, d_z[..., None]], axis=-1)
    grads = _backward(*_with_ones(p, a), d_total, d_state)
    if grads.kv is not None:
        grads = grads._replace(kv=grads.kv[..., :-1], z=grads.kv[..., -1])
    return grads._replace(v=grads.v[..., :-1])


def _forward(p: LinearProblem, a: LinearArrays, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    if a.mask is not None:
        return _of_mask(a.mask).forward(p, a, dtype), None
    if _uniform(p):
        return linear_full.forward(p, a, dtype), None
    return linear_causal.forward(p, a, dtype)


def _backward(p: LinearProblem, a: LinearArrays, d_out: jax.Array, d_state: jax.Array | None) -> LinearGradients:
    if a.mask is not None:
        return _of_mask(a.mask).backward(p, a, d_out)
    if _uniform(p):
        return linear_full.backward(p, a, d_out)
    return linear_causal.backward(p, a, d_out, d_state)


def _of_mask(mask: jax.Array):
    """What computes under a mask of this shape."""
    return linear_thin_mask if 1 in mask.shape[2:] else linear_masked


def _uniform(p: LinearProblem) -> bool:
    """Every query sees every key alike."""
    return not p.causal and p.decay is None and p.sequences is None


def _with_ones(p: LinearProblem, a: LinearArrays) -> tuple[LinearProblem, LinearArrays]:
    ones = jnp.ones((*a.v.shape[:-1], 1), a.v.dtype)
    kv = None
    if a.kv is not None and a.z is not None:
        kv = jnp.concatenate([a.kv, a.z[..., None]], axis=-1)
    arrays = a._replace(v=jnp.concatenate([a.v, ones], axis=-1), kv=kv)
    return dataclasses.replace(p, Dv=p.Dv + 1, normalize=False), arrays

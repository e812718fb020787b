"""Linear attention whose mask is the same for every query, or for every key: it scales v, or out, in O(N).

M_ij = b_j: out = scale q (k^T (b v))    db_j = v_j . d(b v)_j
M_ij = a_i: out = scale a q (k^T v)      da_i = dO_i . (scale q k^T v)_i
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jflash.xla.linear_heads import gradient_of, heads_first, product
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem


def forward(p: LinearProblem, a: LinearArrays, dtype: jnp.dtype) -> jax.Array:
    """out [B, Sq, H, Dv] in a dtype."""
    q, k, v = (heads_first(x, p.H) for x in (a.q, a.k, a.v))
    of_keys, of_queries = _factors(a.mask, q.dtype)
    kv = product("bhjd,bhjv->bhdv", k, (v * of_keys).astype(v.dtype))
    out = product("bhid,bhdv->bhiv", q, kv.astype(q.dtype)) * (of_queries * p.scale)
    return jnp.moveaxis(out, 1, 2).astype(dtype)


def backward(p: LinearProblem, a: LinearArrays, d_out: jax.Array) -> LinearGradients:
    """Gradients of q, k, v and, if wanted, the mask."""
    q, k, v, d_out = (heads_first(x, p.H) for x in (a.q, a.k, a.v, d_out))
    of_keys, of_queries = _factors(a.mask, q.dtype)
    scaled_v, scaled_d_out = (v * of_keys).astype(v.dtype), (d_out * of_queries).astype(q.dtype)
    kv = product("bhjd,bhjv->bhdv", k, scaled_v).astype(q.dtype)
    d_kv = (product("bhid,bhiv->bhdv", q, scaled_d_out) * p.scale).astype(q.dtype)
    d_scaled_v = product("bhjd,bhdv->bhjv", k, d_kv)
    d_mask = None
    if p.mask_gradient and a.mask.shape[3] == 1:
        d_mask = (product("bhid,bhdv->bhiv", q, kv) * p.scale * d_out).sum(axis=3, keepdims=True)
    elif p.mask_gradient:
        d_mask = (d_scaled_v * v).sum(axis=3)[:, :, None]
    return LinearGradients(
        q=gradient_of(a.q, product("bhiv,bhdv->bhid", scaled_d_out, kv) * p.scale),
        k=gradient_of(a.k, product("bhjv,bhdv->bhjd", scaled_v, d_kv)),
        v=gradient_of(a.v, d_scaled_v * of_keys),
        mask=None if d_mask is None else _summed(d_mask, a.mask),
    )


def _factors(mask: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """What v and out are multiplied by, [B|1, H|1, S|1, 1] in float32 or wider: the mask is one, the other is 1."""
    mask = mask.astype(jnp.promote_types(dtype, jnp.float32))
    one = jnp.ones((1, 1, 1, 1), mask.dtype)
    return (one, mask) if mask.shape[3] == 1 else (jnp.swapaxes(mask, 2, 3), one)


def _summed(gradient: jax.Array, mask: jax.Array) -> jax.Array:
    """A gradient summed over the axes on which the mask broadcasts, in its shape and dtype."""
    axes = tuple(axis for axis, n in enumerate(mask.shape) if n == 1)
    return gradient.sum(axis=axes, keepdims=True).astype(mask.dtype)

"""Linear attention in which every query sees every key alike: out = scale q (k^T v), two products."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jflash.xla.linear_heads import gradient_of, heads_first, product
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem


def forward(p: LinearProblem, a: LinearArrays, dtype: jnp.dtype) -> jax.Array:
    """out [B, Sq, H, Dv] in a dtype."""
    q, k, v = (heads_first(x, p.H) for x in (a.q, a.k, a.v))
    kv = product("bhjd,bhjv->bhdv", k, v)
    out = product("bhid,bhdv->bhiv", q, kv.astype(q.dtype)) * p.scale
    return jnp.moveaxis(out, 1, 2).astype(dtype)


def backward(p: LinearProblem, a: LinearArrays, d_out: jax.Array) -> LinearGradients:
    """Gradients of q, k and v."""
    q, k, v, d_out = (heads_first(x, p.H) for x in (a.q, a.k, a.v, d_out))
    kv = product("bhjd,bhjv->bhdv", k, v).astype(q.dtype)
    d_kv = (product("bhid,bhiv->bhdv", q, d_out) * p.scale).astype(q.dtype)
    return LinearGradients(
        q=gradient_of(a.q, product("bhiv,bhdv->bhid", d_out, kv) * p.scale),
        k=gradient_of(a.k, product("bhjv,bhdv->bhjd", v, d_kv)),
        v=gradient_of(a.v, product("bhjd,bhdv->bhjv", k, d_kv)),
    )

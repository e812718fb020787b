"""Products of operands [..., heads, rows, columns] that share heads: each of Hq, Hk, Hv divides H."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jflash.xla.tiles import summed


def spread(x: jax.Array, heads: int) -> jax.Array:
    """[B, Hx, ...] -> [B, H, ...]: head h is head h // (H / Hx) of x."""
    return jnp.repeat(x, heads // x.shape[1], axis=1)


def gather(x: jax.Array, heads: int) -> jax.Array:
    """[B, H, ...] -> [B, Hx, ...]: sums over the heads that share one, as the transpose of `spread`."""
    if x.shape[1] == heads:
        return x
    return summed(x.reshape(x.shape[0], heads, -1, *x.shape[2:]), axis=2).squeeze(2)


def working_dtype(dtype) -> jnp.dtype:
    """What enters a product. Sums over a long sequence leave the range of float16, so that becomes float32."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum accumulated in float32 or wider; float32 operands are not rounded on the way."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST, preferred_element_type=wide)


def heads_first(x: jax.Array, heads: int) -> jax.Array:
    """[B, S, Hx, D] -> [B, H, S, D] in what enters a product."""
    return spread(jnp.moveaxis(x, 2, 1), heads).astype(working_dtype(x.dtype))


def gradient_of(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """[B, H, S, D] -> the gradient of x [B, S, Hx, D], in its dtype."""
    return jnp.moveaxis(gather(gradient, x.shape[2]), 1, 2).astype(x.dtype)

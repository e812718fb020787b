"""What is done to queries and keys before linear attention: positive features, and unit length.

Each maps [..., D] to [..., D'] in the input's dtype, computed in float32 or wider.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def _wide_inside(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Computes in float32 or wider, returns the input's dtype."""

    @functools.wraps(function)
    def call(x: jax.Array, *args, **options) -> jax.Array:
        return function(x.astype(jnp.promote_types(x.dtype, jnp.float32)), *args, **options).astype(x.dtype)

    return call


@_wide_inside
def elu_plus_one(x: jax.Array) -> jax.Array:
    """`elu(x) + 1` = x + 1 for x > 0, else exp(x): positive, D' = D. (Katharopoulos et al., arXiv 2006.16236)"""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))  # jnp.minimum halves the slope at 0


@_wide_inside
def taylor(x: jax.Array) -> jax.Array:
    """Features with `taylor(q) . taylor(k) = 1 + q.k + (q.k)^2 / 2`, which is positive. D' = 1 + D + D (D + 1) / 2.

    The second-order map of Arora et al., Based (arXiv 2402.18668), each product once.
    """
    i, j = np.triu_indices(x.shape[-1])
    pairs = x[..., i] * x[..., j] * jnp.where(i == j, 0.5**0.5, 1.0).astype(x.dtype)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs], axis=-1)


@_wide_inside
def dpfp(x: jax.Array, nu: int = 1) -> jax.Array:
    """Deterministic parameter-free projection: products of `relu([x, -x])` with itself shifted by 1 to nu.

    D' = 2 D nu, not negative, few features at once. (Schlag et al., arXiv 2102.11174)
    """
    if not 1 <= nu < 2 * x.shape[-1]:
        raise ValueError(f"nu={nu} must be >= 1 and < 2 D={2 * x.shape[-1]}")
    positive = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    return jnp.concatenate([positive * jnp.roll(positive, shift, axis=-1) for shift in range(1, nu + 1)], axis=-1)


@_wide_inside
def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """`x / sqrt(sum(x^2) + eps)`: with it, weights stay in [-1, 1] and long float16 sums in range."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + eps)

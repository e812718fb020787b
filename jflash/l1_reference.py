"""The oracle: L1 attention written as its definition, O(Sq Sk D) memory, gradients by autodiff.

    d_ij = sum_w |q_iw - k_jw|                   centered: less (sum_w |q_iw| + sum_w |k_jw|) / sqrt(2)
    s = -scale d  or  1 / (eps + scale d)        plus bias, masked to -inf
    out = softmax(s) v  or  exp(s) v  or  (1 + tanh(s)) v

It defines what every backend must compute. |x| is x sign(x), whose derivative at 0 is 0. Given 16-bit inputs
it subtracts and sums in float32 and rounds what enters a product, as any kernel must.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jflash import reference
from pallas_kernels.problem import AttentionArrays, L1Problem


def l1_attention(p: L1Problem, a: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] in the input dtype and lse [B, H, Sq] in float32 or wider, 0 but for softmax."""
    q = jnp.moveaxis(a.q, 1, 2)[:, :, :, None]
    k = jnp.repeat(jnp.moveaxis(a.k, 1, 2), p.group, axis=1)[:, :, None]
    s = scores(p, q, k)
    if a.bias is not None:
        s = s + a.bias.astype(s.dtype)
    if p.exclude_diagonal:
        own = jnp.arange(p.Sq)[:, None] + p.offset == jnp.arange(p.Sk)
        s = jnp.where(own, -jnp.inf, s)
    if p.weight == "softmax":
        return reference.softmax(p, a, s)
    weights = reference.by_group(p, weight(p, jnp.where(reference.visible(p, a), s, -jnp.inf)))
    out = jnp.einsum("bhgij,bjhv->bihgv", weights.astype(a.v.dtype), a.v, preferred_element_type=s.dtype)
    return out.reshape(p.B, p.Sq, p.H, p.Dv).astype(a.q.dtype), jnp.zeros(s.shape[:3], s.dtype)


def scores(p: L1Problem, q: jax.Array, k: jax.Array) -> jax.Array:
    """Scores of q [..., D] and k [..., D], in float32 or wider."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    d = size(q.astype(wide) - k.astype(wide))
    return scores_of_distances(p, reference.round_cotangent(d, q.dtype), q, k)


def scores_of_distances(p: L1Problem, d: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """Scores from the distances d [...] of q [..., D] and k [..., D]."""
    if p.center:
        d = d - (size(q.astype(d.dtype)) + size(k.astype(d.dtype))) / jnp.sqrt(jnp.asarray(2, d.dtype))
    return -p.scale * d if p.kind == "neg" else 1 / (p.eps + p.scale * d)


def weight(p: L1Problem, s: jax.Array) -> jax.Array:
    """Weights without a denominator; 1 + tanh(s) is 2 sigmoid(2 s), which is accurate for small weights too."""
    return jnp.exp(s) if p.weight == "exp" else 2 * jax.nn.sigmoid(2 * s)


def size(x: jax.Array) -> jax.Array:
    """sum_w |x_w| over the last axis."""
    return (x * jnp.sign(x)).sum(axis=-1)

"""The oracle: softmax attention written as its definition, O(Sq Sk) memory, gradients by autodiff.

    s = softcap(scale q k^T) + bias - slope |i + Sk - Sq - j|         masked to -inf
    lse = log(sum_j exp(s_j) + exp(sink))
    out = dropout(exp(s - lse)) v

It defines what every backend must compute. Give it float64 for the truth; given 16-bit inputs it keeps
statistics in float32 and rounds what enters a matrix product, as any kernel must.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jflash.xla.operands import present
from pallas_kernels.parts import dropout, ranges
from pallas_kernels.problem import AttentionArrays, AttentionProblem, CacheArrays


def attention(problem: AttentionProblem, arrays: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """Returns out [B, Sq, H, Dv] in the input dtype and the natural-log lse [B, H, Sq] in float32 or wider."""
    arrays = present(arrays)
    return softmax(problem, arrays, _scores(problem, arrays))


def attention_on_cache(p: AttentionProblem, a: CacheArrays) -> tuple[jax.Array, jax.Array]:
    """`attention` on the keys and values that a cache holds for each batch entry."""
    key_ranges = ranges.of_cache(p, a)
    p = dataclasses.replace(p, left=None, right=None, key_ranges=True)
    arrays = AttentionArrays(a.q, a.k, a.v, key_ranges=key_ranges, alibi_slopes=a.alibi_slopes, sinks=a.sinks)
    if a.pages is not None:
        whole = lambda x: x.at[a.pages].get(mode="clip").reshape(p.B, p.Sk, *x.shape[2:])  # noqa: E731
        arrays = arrays._replace(k=whole(a.k), v=whole(a.v))
    used = visible(p, arrays).any(axis=(1, 2))[:, :, None, None]
    return attention(p, arrays._replace(v=jnp.where(used, arrays.v, 0)))


def softmax(p: AttentionProblem, a: AttentionArrays, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """out and lse from scores [B, H, Sq, Sk] before masking."""
    s = jnp.where(visible(p, a), scores, -jnp.inf)
    top = s.max(axis=-1, initial=-jnp.inf)
    if a.sinks is not None:
        sink = jnp.broadcast_to(a.sinks.astype(s.dtype)[:, :, None], top.shape)
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.exp(s - top[..., None])
    total = weights.sum(axis=-1)
    if a.sinks is not None:
        total = total + jnp.exp(sink - top)
    some = total != 0  # NaN is something; else a row that sees no key: out 0, lse -inf, gradients 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    if p.dropout_rate:
        weights = jnp.where(_kept(p, a), weights / (1.0 - p.dropout_rate), 0.0)
    out = jnp.einsum("bhgij,bjhv->bihgv", by_group(p, weights).astype(a.v.dtype), a.v, preferred_element_type=s.dtype)
    out = out.reshape(p.B, p.Sq, p.H, p.Dv) / jnp.moveaxis(total, 1, 2)[..., None]
    return out.astype(a.q.dtype), lse


def _scores(p: AttentionProblem, a: AttentionArrays) -> jax.Array:
    """Scores before masking, [B, H, Sq, Sk] in float32 or wider."""
    wide = jnp.promote_types(a.q.dtype, jnp.float32)
    q = a.q.reshape(p.B, p.Sq, p.Hk, p.group, p.D)
    s = jnp.einsum("bihgd,bjhd->bhgij", q, a.k, preferred_element_type=wide)
    s = round_cotangent(s, a.q.dtype).reshape(p.B, p.H, p.Sq, p.Sk) * p.scale
    if p.softcap is not None:
        s = p.softcap * jnp.tanh(s / p.softcap)
    if a.bias is not None:
        s = s + a.bias.astype(wide)
    if a.alibi_slopes is not None:
        i, j = _positions(p, a)
        slopes = a.alibi_slopes.astype(wide)
        slopes = slopes[..., None] if slopes.ndim == 3 else slopes[..., None, None]
        s = s - slopes * jnp.abs(i - j)
    return s


def visible(p: AttentionProblem, a: AttentionArrays) -> jax.Array:
    """Which scores take part, bool, broadcastable to [B, H, Sq, Sk]."""
    i, j = _positions(p, a)
    seen = jnp.ones((1, 1, p.Sq, p.Sk), bool)
    if p.left is not None:
        seen &= j >= i - p.left
    if p.right is not None:
        seen &= j <= i + p.right
    if a.key_ranges is not None:
        first, last = (a.key_ranges[:, n, None, :, None] for n in range(2))
        seen = seen & (first <= j) & (j <= last)
    if a.mask is not None:
        seen = seen & a.mask
    if a.q_segment_ids is not None and a.kv_segment_ids is not None:
        seen = seen & (a.q_segment_ids[:, None, :, None] == a.kv_segment_ids[:, None, None, :])
    return seen


def _kept(p: AttentionProblem, a: AttentionArrays) -> jax.Array:
    """Which weights dropout leaves, bool [B, H, Sq, Sk]."""
    assert a.dropout_seeds is not None
    seeds = a.dropout_seeds[:, :, None, None, None]
    h = jnp.arange(p.H, dtype=jnp.uint32)[:, None, None]
    i = jnp.arange(p.Sq, dtype=jnp.uint32)[:, None]
    j = jnp.arange(p.Sk, dtype=jnp.uint32)
    return dropout.keep(*dropout.row_keys(seeds[:, 0], seeds[:, 1], h, i), j, p.dropout_rate)


def _positions(p: AttentionProblem, a: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """Key positions of the queries (a column, [B|1, 1] of them with key_ranges) and of the keys (a row)."""
    own = None if a.key_ranges is None else a.key_ranges[:, 2, None, :, None]
    return jnp.arange(p.Sq)[:, None] + p.offset if own is None else own, jnp.arange(p.Sk)[None, :]


def by_group(p: AttentionProblem, x: jax.Array) -> jax.Array:
    return x.reshape(p.B, p.Hk, p.group, p.Sq, p.Sk)


def round_cotangent(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x itself, with a cotangent rounded to dtype: dS enters the products that give dQ and dK in it."""
    rounded = x.astype(dtype).astype(x.dtype)
    return rounded + jax.lax.stop_gradient(x - rounded)

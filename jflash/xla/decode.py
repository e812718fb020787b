"""Attention that reads a key/value cache where it lies: an online softmax over blocks of its rows or pages.

Forward only. Nothing gathers the whole cache: a step takes one block of keys from every batch entry, and the
steps end with the longest entry.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jflash.xla.scores import product
from pallas_kernels.parts import ranges
from pallas_kernels.problem import AttentionProblem, CacheArrays

_KEYS = 512  # of a batch entry in a step
_SCORES_IN_FLIGHT = {"cpu": 2**21}
_SCORES_IN_FLIGHT_ELSEWHERE = 2**26


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How an entry's pages are cut: `pages` whole ones in a block, or each page in `cuts` blocks, of `keys` keys."""

    page: int
    pages: int
    cuts: int
    keys: int

    def holding(self, key: jax.Array) -> jax.Array:
        """The block of a key."""
        if self.pages > 1:
            return key // self.keys
        return key // self.page * self.cuts + key % self.page // self.keys

    def start(self, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first page of a block, and the slot of that page where it starts: the last cut is moved up to fit."""
        if self.pages > 1:
            return block * self.pages, jnp.int32(0)
        return block // self.cuts, jnp.minimum(block % self.cuts * self.keys, self.page - self.keys)


def forward(p: AttentionProblem, a: CacheArrays) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] in the input dtype and lse [B, H, Sq] in float32 or wider."""
    blocks = _cut(p, a)
    budget = _SCORES_IN_FLIGHT.get(p.target, _SCORES_IN_FLIGHT_ELSEWHERE)
    nq = math.ceil(p.Sq / max(16, budget // (p.B * p.H * blocks.keys)))
    bq = math.ceil(p.Sq / nq)
    missing = nq * bq - p.Sq
    q = jnp.pad(a.q, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(p.B, nq, bq, p.Hk, p.group, p.D)
    key_ranges = jnp.pad(ranges.of_cache(p, a), ((0, 0), (0, 0), (0, missing)), mode="edge").reshape(p.B, 3, nq, bq)
    tasks = q.transpose(1, 0, 3, 4, 2, 5), key_ranges.transpose(2, 1, 0, 3)
    out, lse = lax.map(lambda task: _query_block(p, a, blocks, *task), tasks)
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(p.B, nq * bq, p.H, p.Dv)
    return out[:, : p.Sq], lse.transpose(1, 2, 3, 0, 4).reshape(p.B, p.H, nq * bq)[..., : p.Sq]


def _cut(p: AttentionProblem, a: CacheArrays) -> Blocks:
    page = a.k.shape[1]
    pages = 1 if a.pages is None else min(a.pages.shape[1], max(1, _KEYS // page))
    cuts = math.ceil(page / _KEYS)
    return Blocks(page, pages, cuts, pages * page if pages > 1 else math.ceil(page / cuts))


def _query_block(p: AttentionProblem, a: CacheArrays, blocks: Blocks, q: jax.Array, ranges: jax.Array):
    """out [B, Hk, G, bq, Dv] and lse [B, Hk, G, bq] of queries [B, Hk, G, bq, D] with ranges [3, B, bq]."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    top, total = jnp.full(q.shape[:-1], -jnp.inf, wide), jnp.zeros(q.shape[:-1], wide)
    if a.sinks is not None:
        top = jnp.broadcast_to(a.sinks.reshape(-1, p.Hk, p.group, 1).astype(wide), top.shape)
        total = jnp.ones_like(total)
    acc = jnp.zeros((*q.shape[:-1], p.Dv), wide)
    first, last = jnp.maximum(ranges[0], 0), jnp.minimum(ranges[1], p.Sk - 1)
    some = first <= last
    lo = blocks.holding(jnp.where(some, first, p.Sk).min())
    hi = jnp.where(some.any(), blocks.holding(jnp.where(some, last, 0).max()) + 1, 0)
    step = functools.partial(_step, p, a, blocks, q, (first, last, ranges[2]))
    acc, top, total = lax.fori_loop(lo, hi, step, (acc, top, total))
    some = total != 0  # NaN is something
    total = jnp.where(some, total, 1)
    return (acc / total[..., None]).astype(q.dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)


def _step(p: AttentionProblem, a: CacheArrays, blocks: Blocks, q: jax.Array, ranges, block, carry):
    """Takes one key block of every batch entry into the running (acc, top, total)."""
    acc, top, total = carry
    first, last, position = (x[:, None, None, :, None] for x in ranges)
    page, slot = blocks.start(block)
    j = page * blocks.page + slot + jnp.arange(blocks.keys, dtype=jnp.int32)
    seen = (first <= j) & (j <= last) & (blocks.holding(j) == block)
    k, v = (_keys(p, a, blocks, cache, page, slot) for cache in (a.k, a.v))
    s = product("bhgqd,bkhd->bhgqk", q, k) * p.scale
    if p.softcap is not None:
        s = p.softcap * jnp.tanh(s / p.softcap)
    if a.alibi_slopes is not None:
        slopes = a.alibi_slopes.reshape(-1, p.Hk, p.group, 1, 1)
        s = s - slopes.astype(s.dtype) * jnp.abs(position - j).astype(s.dtype)
    s = jnp.where(seen, s, -jnp.inf)
    new_top = jnp.maximum(top, s.max(axis=-1))
    safe = jnp.where(new_top == -jnp.inf, 0, new_top)  # a row that has seen no key yet
    weights, fade = jnp.exp(s - safe[..., None]), jnp.exp(top - safe)
    used = seen[:, 0, 0].any(axis=1)[:, :, None, None]  # what lies in unused slots may be NaN
    v = jnp.where(used, v, 0)
    acc = acc * fade[..., None] + product("bhgqk,bkhv->bhgqv", weights.astype(v.dtype), v)
    return acc, new_top, total * fade + weights.sum(axis=-1)


def _keys(p: AttentionProblem, a: CacheArrays, blocks: Blocks, cache: jax.Array, page, slot) -> jax.Array:
    """A block [B, keys, Hk, D] of a cache [N, page, Hk, D]. A table's last entries may be read twice, unseen."""
    if a.pages is None:
        return lax.dynamic_slice_in_dim(cache, slot, blocks.keys, axis=1)
    if blocks.pages == 1:
        size = (1, blocks.keys, *cache.shape[2:])
        one = lambda row: lax.dynamic_slice(cache, (row, slot, jnp.int32(0), jnp.int32(0)), size)[0]  # noqa: E731
        return jax.vmap(one)(lax.dynamic_index_in_dim(a.pages, page, axis=1, keepdims=False))
    rows = a.pages.at[:, page + jnp.arange(blocks.pages)].get(mode="clip")
    return cache.at[rows].get(mode="clip").reshape(p.B, blocks.keys, *cache.shape[2:])

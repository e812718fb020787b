"""Blocked forward: for each query block, an online softmax over the key blocks it can see.

Tiles follow FlashAttention-2 (Dao, arXiv 2307.08691): queries outside, keys inside, one division at the end.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jflash.xla import operands, tiles
from jflash.xla.operands import Grouped
from jflash.xla.scores import At, kept, key_blocks, product, scores
from jflash.xla.tiles import Tile, take
from pallas_kernels.problem import AttentionArrays, AttentionProblem


def forward(p: AttentionProblem, a: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] in the input dtype and lse [B, H, Sq] in float32 or wider."""
    return forward_blocks(p, a, _step)


def forward_blocks(p: AttentionProblem, a: AttentionArrays, step) -> tuple[jax.Array, jax.Array]:
    """out and lse, where step(p, t, g, q, at, ki, carry, masked) takes a key block into (acc, top, total)."""
    t = tiles.choose(p, block_q=512, block_k=512)
    g = operands.group(p, t, a)
    sinks = None if a.sinks is None else a.sinks.reshape(-1, p.Hk, p.group, 1)
    starts = (jnp.arange(0, n, size, dtype=jnp.int32) for n, size in ((p.B, t.b), (p.Hk, t.h), (t.nq, 1)))
    b, h, qi = (x.ravel() for x in jnp.meshgrid(*starts, indexing="ij"))
    out, lse = lax.map(lambda task: _query_block(p, t, g, step, sinks, *task), (b, h, qi))
    return _join(p, t, out, axis=1), _join(p, t, lse[..., None], axis=2)[..., 0]


def _query_block(p: AttentionProblem, t: Tile, g: Grouped, step, sinks: jax.Array | None, b, h, qi):
    """out [b, h, G, bq, Dv] and lse [b, h, G, bq] of one query block."""
    q = take(g.q, (b, h, 0, qi * t.bq, 0), (t.b, t.h, None, t.bq, None))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    row = (t.b, t.h, p.group, t.bq)
    top, total = jnp.full(row, -jnp.inf, wide), jnp.zeros(row, wide)
    if sinks is not None:
        top = jnp.broadcast_to(take(sinks, (b, h, 0, 0), (t.b, t.h, None, None)).astype(wide), row)
        total = jnp.ones(row, wide)
    acc = jnp.zeros((*row, p.Dv), wide)
    at = At(b, h, qi, jnp.int32(0))
    step = functools.partial(step, p, t, g, q, at)
    acc, top, total = tiles.over_keys(p, t, qi, key_blocks(p, t, g, at), step, (acc, top, total))
    some = total != 0  # NaN is something
    total = jnp.where(some, total, 1)
    out = (acc / total[..., None]).astype(q.dtype)
    return out, jnp.where(some, top + jnp.log(total), -jnp.inf)


def _step(p: AttentionProblem, t: Tile, g: Grouped, q: jax.Array, at: At, ki, carry, masked: bool):
    """Takes one key block into the running (acc, top, total)."""
    at = at._replace(ki=ki)
    k = take(g.k, (at.b, at.h, 0, ki * t.bk, 0), (t.b, t.h, None, t.bk, None))
    s, _ = scores(p, t, g, at, q, k, masked)
    return accumulate(p, t, g, at, s, carry)


def accumulate(p: AttentionProblem, t: Tile, g: Grouped, at: At, s: jax.Array, carry):
    """Takes the masked scores of a tile into the running (acc, top, total)."""
    acc, top, total = carry
    new_top = jnp.maximum(top, s.max(axis=-1))
    safe = jnp.where(new_top == -jnp.inf, 0, new_top)  # a row that has seen no key yet
    weights = jnp.exp(s - safe[..., None])
    fade = jnp.exp(top - safe)
    total = total * fade + weights.sum(axis=-1)
    if p.dropout_rate:
        weights = jnp.where(kept(p, t, g, at), weights / (1 - p.dropout_rate), 0)
    v = take(g.v, (at.b, at.h, 0, at.ki * t.bk, 0), (t.b, t.h, None, t.bk, None))
    acc = acc * fade[..., None] + product("nhgqk,nhkv->nhgqv", weights.astype(v.dtype), v[:, :, 0])
    return acc, new_top, total


def _join(p: AttentionProblem, t: Tile, x: jax.Array, axis: int) -> jax.Array:
    """Blocks [tasks, b, h, G, bq, D] -> [B, H, Sq, D] with the Sq axis moved to `axis`, padding cut off."""
    x = x.reshape(p.B // t.b, p.Hk // t.h, t.nq, t.b, t.h, p.group, t.bq, -1)
    x = x.transpose(0, 3, 1, 4, 5, 2, 6, 7).reshape(p.B, p.H, t.nq * t.bq, -1)
    return jnp.moveaxis(x[:, :, : p.Sq], 2, axis)

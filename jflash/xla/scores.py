"""One tile of scores, with every feature, and what the backward needs to come back through it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jflash.xla.operands import Grouped
from jflash.xla.tiles import Tile, take
from pallas_kernels.parts import dropout, ranges
from pallas_kernels.problem import AttentionProblem


class At(NamedTuple):
    """Where a tile stands: its first batch and key/value head, and its query and key block."""

    b: jax.Array
    h: jax.Array
    qi: jax.Array
    ki: jax.Array

    def starts(self, t: Tile) -> tuple:
        return self.b, self.h, 0, self.qi * t.bq, self.ki * t.bk


def sizes(t: Tile) -> tuple:
    return t.b, t.h, None, t.bq, t.bk


def scores(p: AttentionProblem, t: Tile, g: Grouped, at: At, q: jax.Array, k: jax.Array, masked: bool):
    """Scores of a query block q [b, h, G, bq, D] and a key block k [b, h, 1, bk, D].

    Returns s [b, h, G, bq, bk], -inf where not visible, and d(s)/d(scale q k^T), None where it is 1.
    `masked` is False for a tile that every query of it sees whole.
    """
    s = product("nhgqd,nhkd->nhgqk", q, k[:, :, 0]) * p.scale
    slope = None
    if p.softcap is not None:
        bent = jnp.tanh(s / p.softcap)
        s, slope = p.softcap * bent, 1 - bent * bent
    if g.bias is not None:
        s = s + take(g.bias, at.starts(t), sizes(t)).astype(s.dtype)
    if g.alibi_slopes is not None:
        i, j = positions(p, t, g, at)
        s = s - take(g.alibi_slopes, at.starts(t), sizes(t)).astype(s.dtype) * jnp.abs(i - j).astype(s.dtype)
    seen = visible(p, t, g, at, masked)
    return s if seen is None else jnp.where(seen, s, -jnp.inf), slope


def kept(p: AttentionProblem, t: Tile, g: Grouped, at: At) -> jax.Array:
    """Which weights of a tile dropout leaves, bool [b, h, G, bq, bk]."""
    assert g.dropout_seeds is not None
    seed0, seed1 = (take(seed, at.starts(t), sizes(t)) for seed in g.dropout_seeds)
    head = (at.h + jnp.arange(t.h, dtype=jnp.int32))[:, None, None, None] * p.group + jnp.arange(p.group)[:, None, None]
    i = at.qi * t.bq + jnp.arange(t.bq)[:, None]
    j = at.ki * t.bk + jnp.arange(t.bk)[None, :]
    head, i, j = (x.astype(jnp.uint32) for x in (head, i, j))
    return dropout.keep(*dropout.row_keys(seed0, seed1, head, i), j, p.dropout_rate)


def positions(p: AttentionProblem, t: Tile, g: Grouped, at: At) -> tuple[jax.Array, jax.Array]:
    """Key positions of the queries and of the keys of a tile, int32, broadcastable to [b, h, G, bq, bk]."""
    shape = (t.bq, t.bk)
    j = at.ki * t.bk + lax.broadcasted_iota(jnp.int32, shape, 1)
    if g.key_ranges is not None:
        return take(g.key_ranges.position, at.starts(t), sizes(t)), j
    return at.qi * t.bq + p.offset + lax.broadcasted_iota(jnp.int32, shape, 0), j


def key_blocks(p: AttentionProblem, t: Tile, g: Grouped, at: At) -> ranges.Range:
    """The key blocks that the query block of `at` visits, and those of them without a mask."""
    if g.key_ranges is None:
        return ranges.key_blocks(p, at.qi * t.bq, t.bq, t.bk)
    first, last = (take(x, at.starts(t), sizes(t)) for x in g.key_ranges[:2])
    return ranges.between(first.min(), first.max(), last.min(), last.max(), t.bk, t.nk)


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum accumulated in float32 or wider.

    A GPU rounds float32 operands to 10 bits unless told otherwise; here only a user's own matmul precision does.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 and no_matmul_precision_is_set() else None
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def no_matmul_precision_is_set() -> bool:
    return jax.config.jax_default_matmul_precision is None  # pyright: ignore[reportAttributeAccessIssue]


def visible(p: AttentionProblem, t: Tile, g: Grouped, at: At, masked: bool) -> jax.Array | None:
    """Which scores of a tile take part, broadcastable to [b, h, G, bq, bk]; None: all of them."""
    parts = []
    if masked:
        i, j = positions(p, t, g, at)
        if p.Sk % t.bk:
            parts.append(j < p.Sk)
        if p.left is not None:
            parts.append(j >= i - p.left)
        if p.right is not None:
            parts.append(j <= i + p.right)
        if g.key_ranges is not None:
            first, last = (take(x, at.starts(t), sizes(t)) for x in g.key_ranges[:2])
            parts.append((first <= j) & (j <= last))
    if g.mask is not None:
        parts.append(take(g.mask, at.starts(t), sizes(t)))
    if g.q_segment_ids is not None and g.kv_segment_ids is not None:
        q_ids = take(g.q_segment_ids, at.starts(t), sizes(t))
        parts.append(q_ids == take(g.kv_segment_ids, at.starts(t), sizes(t)))
    seen = None
    for part in parts:
        seen = part if seen is None else seen & part
    return seen

"""Which tiles of the score matrix a causal or windowed call visits, and which of them need no mask.

All four functions of position are monotone, so a range has the shape lo <= full_lo <= full_hi <= hi: tiles in
[lo, hi) hold something visible, tiles in [full_lo, full_hi) hold nothing hidden. `between` serves queries that
bring their own keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.problem import AttentionProblem, CacheArrays

PLACE = 32  # int32: TMA brings things to shared memory in steps of 128 bytes


class Range(NamedTuple):
    lo: jax.Array
    full_lo: jax.Array
    full_hi: jax.Array
    hi: jax.Array


def key_blocks(p: AttentionProblem, first: jax.Array, rows: int, block: int) -> Range:
    """Key blocks for the query rows [first, first + rows)."""
    first = first + p.offset
    last = first + rows - 1
    lo = full_lo = None
    hi, full_hi = None, p.Sk // block
    if p.left is not None:
        lo = _floor(first - p.left, block)
        full_lo = _floor(last - p.left + block - 1, block)
    if p.right is not None:
        hi = _floor(last + p.right + block, block)
        full_hi = jnp.minimum(full_hi, _floor(first + p.right + 1, block))
    return _ordered(lo, full_lo, full_hi, hi, -(-p.Sk // block))


def query_blocks(p: AttentionProblem, first: jax.Array, columns: int, block: int) -> Range:
    """Query blocks for the key columns [first, first + columns)."""
    first = first - p.offset
    last = first + columns - 1
    lo = full_lo = None
    hi, full_hi = None, -(-p.Sq // block)
    if p.right is not None:
        lo = _floor(first - p.right, block)
        full_lo = _floor(last - p.right + block - 1, block)
    if p.left is not None:
        hi = _floor(last + p.left + block, block)
        full_hi = jnp.minimum(full_hi, _floor(first + p.left + 1, block))
    return _ordered(lo, full_lo, full_hi, hi, -(-p.Sq // block))


def limited(p: AttentionProblem, position: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
    """[N, 3, S] for queries at `position` [N, S] whose sequence is the keys [first, end), within p's window.

    The last key of one that sees nothing is -1.
    """
    position, first, end = jnp.broadcast_arrays(position, first, end)
    first, last = in_window(p, position, first, end)
    return jnp.stack([first, jnp.where(first <= last, last, -1), position], axis=1).astype(jnp.int32)


def in_window(p: AttentionProblem, position, first, end) -> tuple:
    """The first and the last of the keys [first, end) that a query at a position sees; if none, they cross."""
    last = end - 1
    if p.left is not None:
        first = jnp.maximum(first, position - p.left)
    if p.right is not None:
        last = jnp.minimum(last, position + p.right)
    return first, last


def of_cache(p: AttentionProblem, a: CacheArrays) -> jax.Array:
    """[B, 3, Sq] of the queries of a call on a cache."""
    end = a.ends[:, None]
    position = end - p.Sq + jnp.arange(p.Sq, dtype=jnp.int32)
    return limited(p, position, jnp.zeros_like(end) if a.starts is None else a.starts[:, None], end)


def between(first, last_first, first_last, last, block: int, blocks: int) -> Range:
    """Key blocks for rows of which each sees one range: the extremes of where those start and of where they end.

    A row that sees nothing starts after the last key and ends at -1, so that no block goes without a mask.
    """
    lo, full_lo = _floor(first, block), _floor(last_first + block - 1, block)
    full_hi, hi = _floor(first_last + 1, block), _floor(last + block, block)
    return _ordered(lo, full_lo, full_hi, hi, blocks)


def table(key_ranges: jax.Array, rows: int, block: int, Sk: int) -> jax.Array:
    """For each block of query rows its Range of key blocks, int32 [B|1, query blocks, 4]; also from `limits`.

    As `between` of each, but where no block is full, full_hi may be below full_lo. In few operations: torch runs them
    one by one where it launches the kernels itself.
    """
    limits = in_blocks(key_ranges[:, :2], rows)  # [B|1, first and last, query blocks, rows]
    extremes = jnp.stack([limits.min(axis=3), limits.max(axis=3)], axis=3)
    bounds = jnp.moveaxis(extremes, 1, 2).reshape(limits.shape[0], -1, 4)
    bounds = lax.div(bounds + jnp.array([0, block - 1, 1, block], jnp.int32), jnp.int32(block))
    bounds = jnp.minimum(bounds, -(-Sk // block))
    return jnp.maximum(bounds, bounds[..., :1] * jnp.array([1, 0, 0, 1], jnp.int32))  # none is below 0, nor hi below lo


def limits(key_ranges: jax.Array, rows: int) -> jax.Array:
    """The first and the last key of each query row, int32 [B|1, 2, Sq in whole blocks]."""
    return in_blocks(key_ranges[:, :2], rows).reshape(key_ranges.shape[0], 2, -1)


def visitors(visits: jax.Array, blocks: int) -> jax.Array:
    """For each of `blocks` key blocks the query blocks [lo, hi) that a `table` sends to it, int32 [B|1, blocks, 2]."""
    block, row = jnp.arange(blocks, dtype=jnp.int32)[:, None], jnp.arange(visits.shape[1], dtype=jnp.int32)
    visited = (visits[:, None, :, 0] <= block) & (block < visits[:, None, :, 3])
    lo = jnp.where(visited, row, visits.shape[1]).min(axis=2)
    hi = jnp.where(visited, row + 1, 0).max(axis=2)
    return jnp.stack([jnp.minimum(lo, hi), hi], axis=2)


def places(visits: jax.Array) -> jax.Array:
    """The rows of a `table`, the longest first, each with its number behind: int32 [B|1, query blocks, PLACE]."""
    numbers = lax.broadcasted_iota(jnp.int32, (*visits.shape[:2], 1), 1)
    rows = jnp.concatenate([visits, numbers], axis=2)
    fewer = jnp.broadcast_to(visits[..., :1] - visits[..., 3:], rows.shape)
    rows = lax.sort((fewer, rows), dimension=1, num_keys=1)[1]
    return jnp.pad(rows, ((0, 0), (0, 0), (0, PLACE - rows.shape[2])))


def longest_first(lo: jax.Array, hi: jax.Array) -> jax.Array:
    """The blocks [B|1, blocks] in the order of how much each visits, int32."""
    return jnp.argsort(lo - hi, axis=1).astype(jnp.int32)


def in_blocks(x: jax.Array, rows: int) -> jax.Array:
    """x [..., S] as [..., blocks, rows]; the last value fills up the last block."""
    missing = -x.shape[-1] % rows
    if missing:
        x = jnp.concatenate([x, jnp.broadcast_to(x[..., -1:], (*x.shape[:-1], missing))], axis=-1)
    return x.reshape(*x.shape[:-1], -1, rows)


def _ordered(lo, full_lo, full_hi, hi, blocks: int) -> Range:
    """Clips to [0, blocks] and makes the four bounds monotone; None is open."""
    lo = jnp.int32(0) if lo is None else jnp.minimum(lo, blocks)
    hi = jnp.int32(blocks) if hi is None else jnp.maximum(lo, jnp.minimum(hi, blocks))
    full_lo = lo if full_lo is None else jnp.clip(full_lo, lo, hi)
    return Range(lo, full_lo, jnp.clip(full_hi, full_lo, hi), hi)


def _floor(x: jax.Array, block: int) -> jax.Array:
    """max(0, floor(x / block)), without the signed-division code a kernel would carry."""
    return lax.div(jnp.maximum(x, 0), jnp.int32(block))

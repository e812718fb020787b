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

from pallas_kernels.problem import AttentionProblem


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


def between(first, last_first, first_last, last, block: int, blocks: int) -> Range:
    """Key blocks for rows of which each sees one range: the extremes of where those start and of where they end.

    A row that sees nothing starts after the last key and ends at -1, so that no block goes without a mask.
    """
    lo, full_lo = _floor(first, block), _floor(last_first + block - 1, block)
    full_hi, hi = _floor(first_last + 1, block), _floor(last + block, block)
    return _ordered(lo, full_lo, full_hi, hi, blocks)


def table(key_ranges: jax.Array, rows: int, block: int, Sk: int) -> jax.Array:
    """For each block of query rows its Range of key blocks, int32 [B|1, query blocks, 4]."""
    first, last = (in_blocks(key_ranges[:, n], rows) for n in range(2))
    extremes = first.min(axis=2), first.max(axis=2), last.min(axis=2), last.max(axis=2)
    return jnp.stack(between(*extremes, block, -(-Sk // block)), axis=2)


def limits(key_ranges: jax.Array, rows: int) -> jax.Array:
    """The first and the last key of each query row, int32 [B|1, 2, Sq in whole blocks]."""
    return jnp.stack([in_blocks(key_ranges[:, n], rows).reshape(key_ranges.shape[0], -1) for n in range(2)], axis=1)


def visitors(visits: jax.Array, blocks: int) -> jax.Array:
    """For each of `blocks` key blocks the query blocks [lo, hi) that a `table` sends to it, int32 [B|1, blocks, 2]."""
    block = jnp.arange(blocks)[:, None]
    visited = (visits[:, None, :, 0] <= block) & (block < visits[:, None, :, 3])
    lo = jnp.argmax(visited, axis=2)
    hi = jnp.where(visited.any(axis=2), visited.shape[2] - jnp.argmax(visited[:, :, ::-1], axis=2), lo)
    return jnp.stack([lo, hi], axis=2).astype(jnp.int32)


def longest_first(lo: jax.Array, hi: jax.Array) -> jax.Array:
    """The blocks [B|1, blocks] in the order of how much each visits, int32."""
    return jnp.argsort(lo - hi, axis=1).astype(jnp.int32)


def in_blocks(x: jax.Array, rows: int) -> jax.Array:
    """x [B, S] as [B, blocks, rows]; the last value fills up the last block."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % rows)), mode="edge")
    return x.reshape(x.shape[0], -1, rows)


def _ordered(lo, full_lo, full_hi, hi, blocks: int) -> Range:
    """Clips to [0, blocks] and makes the four bounds monotone; None is open."""
    lo = jnp.int32(0) if lo is None else jnp.minimum(lo, blocks)
    hi = jnp.int32(blocks) if hi is None else jnp.maximum(lo, jnp.minimum(hi, blocks))
    full_lo = lo if full_lo is None else jnp.clip(full_lo, lo, hi)
    return Range(lo, full_lo, jnp.clip(full_hi, full_lo, hi), hi)


def _floor(x: jax.Array, block: int) -> jax.Array:
    """max(0, floor(x / block)), without the signed-division code a kernel would carry."""
    return lax.div(jnp.maximum(x, 0), jnp.int32(block))

"""How the blocked XLA path cuts a problem: sizes of a tile, slices of an operand, key blocks of a query block.

Inside this package heads are split in (Hk, G), so every array has five axes, in the order [B, Hk, G, S, D]
or [B, Hk, G, Sq, Sk], and an axis of size 1 broadcasts.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.parts.ranges import Range
from pallas_kernels.problem import AttentionProblem

# Scores in flight: 2 MB stay in a CPU's cache; a GPU wants large matrix products.
_SCORES_IN_FLIGHT = {"cpu": 2**19}
_SCORES_IN_FLIGHT_ELSEWHERE = 2**26


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile takes b batches, h key/value heads with their groups, bq queries and bk keys at a time."""

    b: int
    h: int
    bq: int
    bk: int
    nq: int  # query blocks
    nk: int  # key blocks


def choose(p: AttentionProblem, block_q: int, block_k: int) -> Tile:
    """The tile nearest to the wanted block sizes whose scores fit the cache."""
    budget = _SCORES_IN_FLIGHT.get(p.target, _SCORES_IN_FLIGHT_ELSEWHERE)
    bk, nk = _equal_blocks(p.Sk, block_k)
    bq, nq = _equal_blocks(p.Sq, max(64, min(block_q, budget // (p.group * bk) // 8 * 8)))
    heads = max(1, budget // (p.group * bq * bk))
    h = largest_divisor(p.Hk, heads)
    b = largest_divisor(p.B, heads // h) if h == p.Hk else 1
    return Tile(b, h, bq, bk, nq, nk)


def over_keys(p: AttentionProblem, t: Tile, qi: jax.Array, r: Range, step, carry):
    """Folds `step(ki, carry, masked)` over the key blocks r of query block qi, masking only where needed."""
    if p.left is not None or p.key_ranges:
        carry = lax.fori_loop(r.lo, r.full_lo, lambda ki, c: step(ki, c, True), carry)
    carry = lax.fori_loop(r.full_lo, r.full_hi, lambda ki, c: step(ki, c, False), carry)
    if p.right is not None or p.key_ranges or p.Sk % t.bk:
        carry = lax.fori_loop(r.full_hi, r.hi, lambda ki, c: step(ki, c, True), carry)
    return carry


def take(x: jax.Array, starts, sizes) -> jax.Array:
    """The block of x at `starts`, of `sizes` where not None (the whole axis); an axis of size 1 broadcasts."""
    sizes = [n if size is None or n == 1 else size for size, n in zip(sizes, x.shape, strict=True)]
    return lax.dynamic_slice(x, _corner(x, starts), sizes)


def put(x: jax.Array, block: jax.Array, starts) -> jax.Array:
    """Writes a block into x at `starts`."""
    return lax.dynamic_update_slice(x, block, _corner(x, starts))


def add(x: jax.Array, block: jax.Array, starts, sizes) -> jax.Array:
    """Adds a block into x where `take` would read it, summed over the axes on which x broadcasts."""
    block = block.astype(x.dtype)
    for axis, n in enumerate(x.shape):
        if n == 1:
            block = summed(block, axis)
    return lax.dynamic_update_slice(x, take(x, starts, sizes) + block, _corner(x, starts))


def summed(x: jax.Array, axis: int) -> jax.Array:
    """x summed over an axis, which stays with length 1."""
    if axis >= x.ndim - 2:
        return x.sum(axis, keepdims=True)
    # XLA takes a hundred times as long on a CPU to reduce an outer axis as to add its slices.
    slices = [lax.slice_in_dim(x, i, i + 1, axis=axis) for i in range(x.shape[axis])]
    return functools.reduce(jnp.add, slices)


def _corner(x: jax.Array, starts) -> list:
    return [jnp.int32(0 if n == 1 else start) for start, n in zip(starts, x.shape, strict=True)]


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, or 1; 1 for a symbolic shape of `jax.export`."""
    if not isinstance(n, int) or not isinstance(most, int):
        return 1
    return next(d for d in range(min(n, max(most, 1)), 0, -1) if n % d == 0)


def _equal_blocks(length: int, most: int) -> tuple[int, int]:
    """The size, a multiple of 8, and the number of blocks of about equal size; `most` is a multiple of 8."""
    if not isinstance(length, int):
        raise NotImplementedError(f"sequence length {length} is symbolic, which only implementation='reference' takes")
    size = 8 * math.ceil(length / math.ceil(length / most) / 8)
    return size, math.ceil(length / size)

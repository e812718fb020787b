"""How the chunked linear path cuts time: [B, S, Hx, ...] into chunks [n, B, Hx, C, ...] and back.

A packed row is cut so that no chunk holds tokens of two sequences; what a chunk has beyond its tokens is 0,
which adds nothing to a state and, as a log decay, takes nothing from it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflash.xla.tiles import largest_divisor
from pallas_kernels.problem import LinearProblem

# Weights in flight, of all heads and chunks that are computed together: few stay in a CPU's cache.
_IN_FLIGHT = {"cpu": 2**18}
_IN_FLIGHT_ELSEWHERE = 2**26


class Packing(NamedTuple):
    """Where the tokens of a packed row are; indices past the end stand for nothing."""

    token: jax.Array  # [n C]: the token at each place of a chunk
    place: jax.Array  # [Sq]: the place of each token
    sequence: jax.Array  # [n]: the sequence of each chunk
    first: jax.Array  # bool [n]: the chunk begins its sequence
    last: jax.Array  # bool [n]: the chunk ends it


@dataclasses.dataclass(frozen=True)
class Cut:
    """n chunks of `size` tokens, `together` of them (a divisor of n) computed at a time."""

    n: int
    size: int
    together: int


def choose(p: LinearProblem) -> Cut:
    size = p.chunk_size or (64 if p.sequences is not None else 128)
    if p.chunk_size is None:
        while size > 16 and size // 2 >= p.Sq:
            size //= 2
    n = math.ceil(p.Sq / size) if p.sequences is None else p.Sq // size + p.sequences
    most = _IN_FLIGHT.get(p.target, _IN_FLIGHT_ELSEWHERE) // (p.B * p.H * size * max(size, p.D, p.Dv))
    return Cut(n, size, largest_divisor(n, most))


def pack(p: LinearProblem, cut: Cut, cu_seqlens: jax.Array | None) -> Packing | None:
    """Each sequence takes as many chunks as hold it, and at least one, so that its state passes through one."""
    if cu_seqlens is None:
        return None
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    chunks = jnp.maximum(1, -(-(ends - starts) // cut.size))
    behind = jnp.cumsum(chunks)  # chunks up to the end of each sequence
    ahead = behind - chunks
    c = jnp.arange(cut.n, dtype=jnp.int32)
    sequence = jnp.searchsorted(behind, c, side="right", method="scan_unrolled").astype(jnp.int32)
    start, end = _lookup(starts, sequence), _lookup(ends, sequence)
    first, last = c == _lookup(ahead, sequence), c == _lookup(behind, sequence) - 1
    token = start + (c - _lookup(ahead, sequence)) * cut.size
    token = token[:, None] + jnp.arange(cut.size, dtype=jnp.int32)
    token = jnp.where(token < end[:, None], token, p.Sq)
    t = jnp.arange(p.Sq, dtype=jnp.int32)
    of = jnp.searchsorted(ends, t, side="right", method="scan_unrolled")
    place = _lookup(ahead, of, cut.n) * cut.size + t - _lookup(starts, of)
    nothing = sequence == p.sequences
    return Packing(token.ravel(), place, sequence, first | nothing, last | nothing)


def _lookup(table: jax.Array, index: jax.Array, otherwise: int = 0) -> jax.Array:
    return table.at[index].get(mode="fill", fill_value=otherwise)


def split(cut: Cut, packing: Packing | None, x: jax.Array) -> jax.Array:
    """[B, S, Hx, ...] -> [n, B, Hx, C, ...]."""
    if packing is None:
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, cut.n * cut.size - x.shape[1])
        x = jnp.pad(x, widths)
    else:
        x = x.at[:, packing.token].get(mode="fill", fill_value=0)
    x = x.reshape(x.shape[0], cut.n, cut.size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3))


def join(cut: Cut, packing: Packing | None, x: jax.Array, length: int) -> jax.Array:
    """[n, B, Hx, C, ...] -> [B, S, Hx, ...]; 0 for tokens outside of every sequence."""
    x = jnp.moveaxis(x, (0, 1, 2, 3), (1, 0, 3, 2))
    x = x.reshape(x.shape[0], cut.n * cut.size, *x.shape[3:])
    return x[:, :length] if packing is None else x.at[:, packing.place].get(mode="fill", fill_value=0)

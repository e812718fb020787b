"""The operands of a call as the blocked path wants them: five axes (B, Hk, G, then rows, then columns)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflash.xla.tiles import Tile
from pallas_kernels.problem import AttentionArrays, AttentionProblem


class KeyRanges(NamedTuple):
    """The keys that each query sees, both ends included, and where it stands; each [B|1, 1, 1, Sq, 1].

    Ends are keys: `first` is Sk and `last` -1 for a query that sees none.
    """

    first: jax.Array
    last: jax.Array
    position: jax.Array


class Grouped(NamedTuple):
    """Operands split in key/value heads and groups and padded to whole tiles; absent features are None."""

    q: jax.Array  # [B, Hk, G, Sq, D]
    k: jax.Array  # [B, Hk, 1, Sk, D]
    v: jax.Array  # [B, Hk, 1, Sk, Dv]
    bias: jax.Array | None  # [B|1, Hk|1, G|1, Sq|1, Sk|1]
    mask: jax.Array | None
    q_segment_ids: jax.Array | None  # [B|1, 1, 1, Sq, 1]
    kv_segment_ids: jax.Array | None  # [B|1, 1, 1, 1, Sk]
    key_ranges: KeyRanges | None
    alibi_slopes: jax.Array | None  # [B|1, Hk, G, Sq|1, 1]
    dropout_seeds: tuple[jax.Array, jax.Array] | None  # each [B, 1, 1, 1, 1]


def present(a: AttentionArrays) -> AttentionArrays:
    """With zeros for rows that belong to no sequence."""
    return a._replace(q=cleared(a, 0, a.q), k=cleared(a, 1, a.k), v=cleared(a, 1, a.v))


def cleared(a: AttentionArrays, side: int, x: jax.Array) -> jax.Array:
    """x [B, S, heads, dim], of queries (side 0) or keys (1), with zeros for rows that belong to no sequence."""
    if a.row_ends is None:
        return x
    behind = jnp.arange(x.shape[1]) >= a.row_ends[:, side, None]
    return jnp.where(behind[:, :, None, None], 0, x)


def group(p: AttentionProblem, t: Tile, a: AttentionArrays) -> Grouped:
    a = present(a)
    seeds = None
    if a.dropout_seeds is not None:
        seeds = tuple(a.dropout_seeds[:, n, None, None, None, None] for n in range(2))
    q_ids, kv_ids = a.q_segment_ids, a.kv_segment_ids
    return Grouped(
        q=rows(p, t, a.q),
        k=columns(t, a.k),
        v=columns(t, a.v),
        bias=None if a.bias is None else square(p, t, a.bias),
        mask=None if a.mask is None else square(p, t, a.mask),
        q_segment_ids=None if q_ids is None else _pad(q_ids, 1, t.nq * t.bq)[:, None, None, :, None],
        kv_segment_ids=None if kv_ids is None else _pad(kv_ids, 1, t.nk * t.bk)[:, None, None, None, :],
        key_ranges=None if a.key_ranges is None else _key_ranges(p, t, a.key_ranges),
        alibi_slopes=None if a.alibi_slopes is None else _slopes(p, t, a.alibi_slopes),
        dropout_seeds=seeds,
    )


def _key_ranges(p: AttentionProblem, t: Tile, x: jax.Array) -> KeyRanges:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, t.nq * t.bq - p.Sq)), mode="edge")  # what pads sees no key of its own
    first, last, position = (x[:, n, None, None, :, None] for n in range(3))
    first, last = jnp.maximum(first, 0), jnp.minimum(last, p.Sk - 1)
    none = last < first
    return KeyRanges(jnp.where(none, p.Sk, first), jnp.where(none, -1, last), position)


def _slopes(p: AttentionProblem, t: Tile, x: jax.Array) -> jax.Array:
    """[B|1, H] or [B|1, H, Sq] -> [B|1, Hk, G, 1 or Sq padded, 1]."""
    each = x.ndim == 3
    x = x.reshape(x.shape[0], p.Hk, p.group, -1, 1)
    return _pad(x, 3, t.nq * t.bq) if each else x


def rows(p: AttentionProblem, t: Tile, x: jax.Array) -> jax.Array:
    """[B, Sq, H, D] of the queries -> [B, Hk, G, Sq padded, D]."""
    x = jnp.moveaxis(x.reshape(p.B, p.Sq, p.Hk, p.group, -1), 1, 3)
    return _pad(x, 3, t.nq * t.bq)


def columns(t: Tile, x: jax.Array) -> jax.Array:
    """[B, Sk, Hk, D] of the keys -> [B, Hk, 1, Sk padded, D]."""
    return _pad(jnp.moveaxis(x, 1, 2)[:, :, None], 3, t.nk * t.bk)


def statistic(p: AttentionProblem, t: Tile, x: jax.Array, value: float) -> jax.Array:
    """[B, H, Sq] of the queries -> [B, Hk, G, Sq padded with a value]."""
    return _pad(x.reshape(p.B, p.Hk, p.group, p.Sq), 3, t.nq * t.bq, value)


def square(p: AttentionProblem, t: Tile, x: jax.Array) -> jax.Array:
    """[B|1, H|1, Sq|1, Sk|1] -> [B|1, Hk|1, G|1, Sq|1, Sk|1], padded where it does not broadcast."""
    heads = (p.Hk, p.group) if x.shape[1] == p.H else (1, 1)
    x = x.reshape(x.shape[0], *heads, *x.shape[2:])
    x = x if x.shape[3] == 1 else _pad(x, 3, t.nq * t.bq)
    return x if x.shape[4] == 1 else _pad(x, 4, t.nk * t.bk)


def _pad(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)

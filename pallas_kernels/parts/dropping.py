"""Dropout on a tile of weights in wgmma's register layout, whichever way round the tile lies.

The keys of the rows are hashed ahead of the kernel and come with the rows' other statistics. A weight that is taken
away is not zeroed but negated: the backward needs its size, for the softmax, beside the fact that it is gone.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import _compat
from pallas_kernels._compat import Interpret
from pallas_kernels.parts import dropout, ranges, wgmma_layout
from pallas_kernels.parts.masking import COLUMNS, WGMMA
from pallas_kernels.parts.softmax import ROWS
from pallas_kernels.parts.wgmma_layout import Word
from pallas_kernels.problem import AttentionArrays, AttentionProblem


def inputs(p: AttentionProblem, a: AttentionArrays, rows: int) -> dict[str, jax.Array]:
    """The two keys of every query row, int32 [B, H, 2, Sq in whole blocks of rows]."""
    if a.dropout_seeds is None:
        return {}
    i = ranges.in_blocks(jnp.arange(p.Sq, dtype=jnp.uint32)[None], rows).reshape(-1)
    first, second = (a.dropout_seeds[:, n, None, None] for n in range(2))
    keys = dropout.row_keys(first, second, jnp.arange(p.H, dtype=jnp.uint32)[:, None], i)
    return {"drop_gmem": lax.bitcast_convert_type(jnp.stack(keys, axis=2), jnp.int32)}


def scratch(p: AttentionProblem, count: int, rows: int) -> dict[str, Any]:
    return {"drop_smem": plgpu.SMEM((count, 2, rows), jnp.int32)} if p.dropout_rate else {}


def copies(p: AttentionProblem) -> int:
    """How often `load` arrives at its barrier."""
    return int(p.dropout_rate > 0)


def load(refs, b, h, row, n, barrier) -> None:
    """Starts to copy the keys of some rows to place n."""
    if refs.drop_gmem is not None:
        keys = refs.drop_gmem.at[b, h, :, pl.ds(row, refs.drop_smem.shape[2])]
        plgpu.copy_gmem_to_smem(keys, refs.drop_smem.at[n], barrier)


def read(refs, n, layout) -> list[jax.Array] | None:
    """The keys at place n in registers."""
    if refs.drop_smem is None:
        return None
    return [_compat.load(refs.drop_smem.at[n, m], layout) for m in range(2)]


def read_rows(refs, n) -> list[jax.Array] | None:
    """The keys of the rows of consumer n; a fence, for TMA brings those of its next tile."""
    keys = read(refs, n, ROWS)
    if keys is not None:
        plgpu.commit_smem()
    return keys


def of_rows(p: AttentionProblem, weights: jax.Array, keys, first_column, interpret: Interpret) -> jax.Array:
    """Weights [queries, keys], negative where dropped."""
    if keys is None:
        return weights
    if interpret is not None:
        first, second = (lax.bitcast_convert_type(key, jnp.uint32)[:, None] for key in keys)
        return _negated(p, weights, first, second, first_column + lax.broadcasted_iota(jnp.int32, weights.shape, 1))
    call = _call(weights, (ROWS, ROWS, plgpu.Layout.WG_SPLAT))
    return call(functools.partial(_of_rows, p.dropout_rate))(weights, *keys, first_column)


def of_columns(p: AttentionProblem, weights: jax.Array, keys, first_row, interpret: Interpret) -> jax.Array:
    """Weights [keys, queries], negative where dropped."""
    if keys is None:
        return weights
    if interpret is not None:
        first, second = (lax.bitcast_convert_type(key, jnp.uint32)[None] for key in keys)
        return _negated(p, weights, first, second, first_row + lax.broadcasted_iota(jnp.int32, weights.shape, 0))
    row = plgpu.broadcasted_iota(jnp.int32, weights.shape[:1], 0, layout=ROWS) + first_row
    call = _call(weights, (COLUMNS, COLUMNS, ROWS))
    return call(functools.partial(_of_columns, p.dropout_rate))(weights, *keys, row)


def kept(p: AttentionProblem, weights: jax.Array) -> jax.Array:
    """What dropout leaves of marked weights, still to be `scaled`."""
    return jnp.maximum(weights, 0.0) if p.dropout_rate else weights


def scaled(p: AttentionProblem, x: jax.Array) -> jax.Array:
    """A product with the weights that are left."""
    return x * (1.0 / (1.0 - p.dropout_rate)) if p.dropout_rate else x


def score_gradient(p: AttentionProblem, weights: jax.Array, dp: jax.Array, delta: jax.Array) -> jax.Array:
    """dS = P (dP - delta) from marked weights and dO V^T."""
    if p.dropout_rate:
        dp = jnp.where(weights > 0.0, scaled(p, dp), 0.0)
        weights = jnp.abs(weights)
    return weights * (dp - delta)


def _negated(p: AttentionProblem, weights, first, second, j) -> jax.Array:
    keep = dropout.keep(first, second, j.astype(jnp.uint32), p.dropout_rate)
    return jnp.where(keep, weights, -weights)


def _call(weights: jax.Array, layouts):
    return plgpu.inline_mgpu(
        arg_types=(WGMMA, *layouts), return_type=plgpu.ShapeDtypeStruct(weights.shape, weights.dtype, WGMMA)
    )


def _of_rows(rate: float, _, weights, first, second, column):
    """Columns are constants, as in `masking`."""
    start = Word(wgmma_layout.first_column()) + Word(column.registers[()])
    start = start * dropout.WEYL
    firsts, seconds = ([Word(wgmma_layout.scalar(x)) for x in key.registers.flat] for key in (first, second))
    firsts = [x + start for x in firsts]

    def keep(column, row):
        return dropout.survives(firsts[row] + column * dropout.WEYL, seconds[row], rate)

    return _marked(weights, keep)


def _of_columns(rate: float, _, weights, first, second, row):
    rows = [Word(wgmma_layout.scalar(x)) * dropout.WEYL for x in row.registers.flat]

    def keep(column, row):
        of_query = (Word(wgmma_layout.scalar(key.registers.flat[column // 8], column % 8)) for key in (first, second))
        x, second_key = of_query
        return dropout.survives(x + rows[row], second_key, rate)

    return _marked(weights, keep)


def _marked(weights, keep):
    """The tile, negated where keep(column less the first of the thread, row 0 or 1) is not so."""

    def element(index, e, column, row):
        weight = wgmma_layout.scalar(weights.registers[index], e)
        return arith.select(keep(column, row), weight, arith.negf(weight))

    return wgmma_layout.tile(weights.shape, element)

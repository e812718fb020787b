"""Hiding scores by position, in wgmma's register layout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import wgmma_layout
from pallas_kernels.parts.softmax import ROWS

WGMMA = plgpu.Layout.WGMMA
COLUMNS = WGMMA.reduce(0)


def hide_columns(s: jax.Array, low: jax.Array | None, high: jax.Array, interpret: Interpret) -> jax.Array:
    """Scores s [rows, columns] with -inf wherever a column is not in [low, high] of its row, both int32 [rows]."""
    bounds = (high,) if low is None else (high, low)
    if interpret is not None:
        column = lax.broadcasted_iota(jnp.int32, s.shape, 1)
        seen = column <= high[:, None]
        return jnp.where(seen if low is None else seen & (column >= low[:, None]), s, -jnp.inf)
    call = plgpu.inline_mgpu(
        arg_types=(WGMMA, *(ROWS for _ in bounds)),
        return_type=plgpu.ShapeDtypeStruct(s.shape, s.dtype, WGMMA),
    )
    return call(_hide_columns)(s, *bounds)


def hide_other_segments(s: jax.Array, row_ids: jax.Array, column_ids: jax.Array) -> jax.Array:
    """Scores s [rows, columns] with -inf where the segment of the row is not that of the column."""
    rows, columns = (lax.broadcast_in_dim(x, s.shape, [axis]) for axis, x in enumerate((row_ids, column_ids)))
    return jnp.where(rows == columns, s, -jnp.inf)


def _hide_columns(_, s, high, low=None):
    """Each comparison is with a constant, so that it costs one instruction and no register."""
    first = wgmma_layout.first_column()
    high = [arith.subi(wgmma_layout.scalar(x), first) for x in high.registers.flat]
    low = low if low is None else [arith.subi(wgmma_layout.scalar(x), first) for x in low.registers.flat]
    hidden = wgmma_layout.real(-math.inf)

    def element(index, e, column, row):
        column = wgmma_layout.integer(column)
        seen = arith.cmpi(arith.CmpIPredicate.sle, column, high[row])
        if low is not None:
            seen = arith.andi(seen, arith.cmpi(arith.CmpIPredicate.sge, column, low[row]))
        return arith.select(seen, wgmma_layout.scalar(s.registers[index], e), hidden)

    return wgmma_layout.tile(s.shape, element)

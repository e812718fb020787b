"""ALiBi on a tile of scores: slope |i - j|.

A plain call has one slope a head, and its positions count on. Queries that bring their own keys bring their own slope
and position too, as float32 beside the other statistics of their rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import math as math_dialect

from pallas_kernels import _compat
from pallas_kernels._compat import Interpret
from pallas_kernels.parts import ranges, tma, wgmma_layout
from pallas_kernels.parts.softmax import ROWS, over_columns
from pallas_kernels.problem import AttentionArrays, AttentionProblem


def inputs(a: AttentionArrays, rows: int) -> dict[str, jax.Array]:
    """Slopes [B|1, H], or with key_ranges slope and position of each query row, [B|1, H, 2, Sq in whole blocks]."""
    if a.alibi_slopes is None:
        return {}
    slopes = a.alibi_slopes.astype(jnp.float32)
    if a.key_ranges is None:
        return {"slopes_gmem": slopes}
    slopes = slopes if slopes.ndim == 3 else slopes[..., None]
    positions = a.key_ranges[:, None, 2].astype(jnp.float32)
    both = jnp.stack(jnp.broadcast_arrays(slopes, positions), axis=2)
    return {"slopes_gmem": ranges.in_blocks(both, rows).reshape(*both.shape[:3], -1)}


def scratch(p: AttentionProblem, count: int, rows: int) -> dict[str, Any]:
    return {"slopes_smem": plgpu.SMEM((count, 2, rows), jnp.float32)} if copies(p) else {}


def copies(p: AttentionProblem) -> int:
    """How often `load` arrives at its barrier."""
    return int(p.alibi and p.key_ranges)


def load(refs, b, h, row, n, barrier) -> None:
    """Starts to copy what belongs to some rows to place n."""
    if refs.slopes_smem is not None:
        source = refs.slopes_gmem.at[tma.batch_entry(refs.slopes_gmem, b), h, :, pl.ds(row, refs.slopes_smem.shape[2])]
        plgpu.copy_gmem_to_smem(source, refs.slopes_smem.at[n], barrier)


def read(refs, b, h, n, layout):
    """The slope of a head, or slopes and positions of the rows at place n; None if there are none."""
    if refs.slopes_gmem is None:
        return None
    if len(refs.slopes_gmem.shape) == 2:
        return refs.slopes_gmem[tma.batch_entry(refs.slopes_gmem, b), h]
    return [_compat.load(refs.slopes_smem.at[n, m], layout) for m in range(2)]


def of_rows(slope, apart, start, shape: tuple[int, int], interpret: Interpret) -> jax.Array:
    """A tile [queries, keys], the keys from `start` on. apart: of a plain call, position of row 0 less column 0's."""
    if not isinstance(slope, list):
        return _distance(apart, shape, interpret) * slope
    slopes, positions = slope
    return _distance_of_rows(positions - jnp.asarray(start, jnp.float32), shape, interpret) * over_columns(
        slopes, shape
    )


def of_columns(slope, apart, start, shape: tuple[int, int], interpret: Interpret) -> jax.Array:
    """A tile [keys, queries], the same way."""
    if not isinstance(slope, list):
        return _distance(apart, shape, interpret) * slope
    slopes, positions = (lax.broadcast_in_dim(x, shape, [1]) for x in slope)
    keys = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=ROWS) + start
    return jnp.abs(over_columns(keys.astype(jnp.float32), shape) - positions) * slopes


def _distance(apart, shape: tuple[int, int], interpret: Interpret) -> jax.Array:
    """|row + apart - column|, float32."""
    if interpret is not None:
        row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
        return jnp.abs(row + apart - column).astype(jnp.float32)
    row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=ROWS) + apart
    return _distance_of_rows(row.astype(jnp.float32), shape, interpret)


def _distance_of_rows(row: jax.Array, shape: tuple[int, int], interpret: Interpret) -> jax.Array:
    """|row - column| of the position of each row, float32."""
    if interpret is not None:
        return jnp.abs(row[:, None] - lax.broadcasted_iota(jnp.int32, shape, 1))
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=(ROWS,), return_type=result)(functools.partial(_distances, shape))(row)


def _distances(shape: tuple[int, int], _, row):
    """Columns are constants, as in `masking`: an addition for each, and no register for its position."""
    first = arith.sitofp(ir.F32Type.get(), wgmma_layout.first_column())
    rows = [arith.subf(wgmma_layout.scalar(x), first) for x in row.registers.flat]

    def element(index, e, column, r):
        return math_dialect.absf(arith.subf(rows[r], wgmma_layout.real(float(column))))

    return wgmma_layout.tile(shape, element)

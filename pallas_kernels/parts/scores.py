"""Softcap, bias and ALiBi on a tile of scores in wgmma's register layout, whichever way round the tile lies."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import math as math_dialect

from pallas_kernels import unproven
from pallas_kernels._compat import Interpret
from pallas_kernels.parts import ptx, wgmma_layout
from pallas_kernels.parts.softmax import LOG2E, ROWS
from pallas_kernels.problem import AttentionProblem


class Scores(NamedTuple):
    """Scores s in units of 1 / factor in base 2, and what dS is to be multiplied by, None where that is 1."""

    s: jax.Array
    factor: float
    slope: jax.Array | None


def modify(
    p: AttentionProblem, products: jax.Array, alibi_slope, apart, interpret: Interpret, bias: jax.Array | None = None
) -> Scores:
    """softcap(scale q k^T) + bias - alibi_slope |i - j| from the products q k^T [rows, columns].

    apart: the position of row 0 less that of column 0. A plain call multiplies nothing: its scale is the factor.
    """
    s, unit, slope = products, p.scale, None
    if p.softcap is not None:
        raised = jnp.exp2(products * (p.scale * 2.0 * LOG2E / p.softcap))
        s, unit = 1.0 - _two_over(1.0 + raised, interpret), p.softcap  # tanh; tanh.approx has 10 bits less
        slope = 1.0 - s * s
    if bias is None and not p.alibi:
        return Scores(s, unit * LOG2E, slope)
    s = s * unit
    if bias is not None:
        s = s + bias
    if p.alibi:
        s = s - _distance(apart, s.shape, interpret) * alibi_slope
    return Scores(s, LOG2E, slope)


def _two_over(x: jax.Array, interpret: Interpret) -> jax.Array:
    """2 / x for x >= 1: one instruction, where a division must mind small and large numbers."""
    if interpret is not None or "softcap by reciprocals" in unproven.FEATURES:
        return 2.0 / x
    call = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=_tile_like(x))
    return 2.0 * call(functools.partial(_reciprocals, x.shape))(x)


def _tile_like(x):
    return plgpu.ShapeDtypeStruct(x.shape, jnp.float32, plgpu.Layout.WGMMA)


def _reciprocals(shape: tuple[int, int], _, x):
    def element(index, e, *_):
        operand = wgmma_layout.scalar(x.registers[index], e)
        return ptx.result(ir.F32Type.get(), "rcp.approx.ftz.f32 $0, $1;", [operand], "=f,f")

    return wgmma_layout.tile(shape, element)


def _distance(apart, shape: tuple[int, int], interpret: Interpret) -> jax.Array:
    """|row + apart - column|, float32."""
    if interpret is not None:
        row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
        return jnp.abs(row + apart - column).astype(jnp.float32)
    row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=ROWS) + apart
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, plgpu.Layout.WGMMA)
    call = plgpu.inline_mgpu(arg_types=(ROWS,), return_type=result)
    return call(functools.partial(_distances, shape))(row.astype(jnp.float32))


def _distances(shape: tuple[int, int], _, row):
    """Columns are constants, as in `masking`: an addition for each, and no register for its position."""
    first = arith.sitofp(ir.F32Type.get(), wgmma_layout.first_column())
    rows = [arith.subf(wgmma_layout.scalar(x), first) for x in row.registers.flat]

    def element(index, e, column, r):
        return math_dialect.absf(arith.subf(rows[r], wgmma_layout.real(float(column))))

    return wgmma_layout.tile(shape, element)

"""L1 distances of a tile of pairs, on the CUDA cores, in wgmma's register layout.

A thread has two rows of each 64 and the columns 8 j + 2 (lane % 4) + {0, 1}. It reads four features at a time, 16
bytes of each of its rows and columns. A feature of a pair costs two additions: |x| is free in an operand.
"""

from __future__ import annotations

# inline_mgpu supplies the first argument of what it decorates.
# pyright: reportCallIssue=false
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import math as math_dialect

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import swizzled_rows, wgmma_layout
from pallas_kernels.parts.swizzled_rows import TRANSFORMS, UNITS, over
from pallas_kernels.parts.wgmma_layout import integer


def negative_distances(x_ref, first, count: int, y_ref, n, interpret: Interpret) -> list[jax.Array]:
    """-sum_w |x_iw - y_jw| for the rows i of tiles first, first + 1, ... of x, and j of tile n of y.

    x has tiles of 64 rows, float32, see `swizzled_rows`, `crossed`. Returns `count` arrays float32 [64, rows of y].
    """
    columns = y_ref.shape[2]
    if interpret is not None:
        x, y = swizzled_rows.values(x_ref, first, count, is_crossed=True), swizzled_rows.values(y_ref, n, 1)
        d = -jnp.abs(x[:, None] - y[None]).sum(axis=-1)
        return [d[64 * m : 64 * (m + 1)] for m in range(count)]
    tile = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, plgpu.Layout.WGMMA)
    rows = plgpu.RefType(TRANSFORMS)
    call = plgpu.inline_mgpu(arg_types=(rows,) * (count + 1), return_type=[tile] * count)
    return call(functools.partial(_distances, columns))(y_ref.at[n], *(x_ref.at[first + m] for m in range(count)))


def _distances(columns: int, _, y_ref, *x_refs):
    """A loop over reads of four features; the sums of a thread go round with it."""
    warp, lane = swizzled_rows.thread()
    row = arith.addi(arith.muli(warp, integer(16)), over(lane, 4))
    column = arith.muli(arith.remui(lane, integer(4)), integer(2))
    zero = [wgmma_layout.real(0.0)] * (columns // 2)
    units = ir.MemRefType(y_ref.type).shape[0] * UNITS

    @utils.fori(integer(units), [list(zero) for _ in x_refs])
    def done(n, sums):
        place = over(n, UNITS), arith.remui(n, integer(UNITS))
        starts = [_pointer(x, row, place) for x in x_refs]
        near = [
            [swizzled_rows.read(swizzled_rows.below(start, 8 * r), is_crossed=True) for r in range(2)]
            for start in starts
        ]
        ends = [_pointer(y_ref, arith.addi(column, integer(e)), place) for e in range(2)]
        for j, e in itertools.product(range(columns // 8), range(2)):
            far = swizzled_rows.read(swizzled_rows.below(ends[e], 8 * j))
            for (total, x), r in itertools.product(zip(sums, near, strict=True), range(2)):
                at = 4 * j + 2 * r + e
                total[at] = arith.subf(total[at], _size(x[r], far))
        return sums

    def tile(total):
        return wgmma_layout.tile((64, columns), lambda _, e, c, r: total[4 * (c // 8) + 2 * r + e])

    return [tile(total) for total in done.results]


def _pointer(ref, row, place):
    chunk, unit = place
    return swizzled_rows.pointer(ref, chunk, row, unit)


def _size(x: list[ir.Value], y: list[ir.Value]) -> ir.Value:
    """sum |x - y|, in pairs: as many additions as one after another, and better rounded."""
    sizes = [math_dialect.absf(arith.subf(a, b)) for a, b in zip(x, y, strict=True)]
    while len(sizes) > 1:
        sizes = [arith.addf(a, b) for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
    return sizes[0]

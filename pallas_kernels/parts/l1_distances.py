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
from pallas_kernels.parts import ptx, swizzled_rows, wgmma_layout
from pallas_kernels.parts.swizzled_rows import TRANSFORMS, UNITS, over
from pallas_kernels.parts.wgmma_layout import integer


def negative_distances(
    x_ref, first, count: int, y_ref, n, interpret: Interpret, is_crossed: bool = False, is_paired: bool = False
) -> list[jax.Array]:
    """-sum_w |x_iw - y_jw| for the rows i of tiles first, first + 1, ... of x, and j of tile n of y.

    x has tiles of 64 rows, float32, see `swizzled_rows`, maybe `crossed`. Returns `count` arrays float32
    [64, rows of y]. Paired, lanes find each other's sums (`swizzled_rows.paired`) and exchange them at the end.
    """
    columns = y_ref.shape[2]
    if interpret is not None:
        x, y = swizzled_rows.values(x_ref, first, count), swizzled_rows.values(y_ref, n, 1)
        x = swizzled_rows.crossed(x) if is_crossed else x
        d = -jnp.abs(x[:, None] - y[None]).sum(axis=-1)
        return [d[64 * m : 64 * (m + 1)] for m in range(count)]
    tile = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, plgpu.Layout.WGMMA)
    rows = plgpu.RefType(TRANSFORMS)
    call = plgpu.inline_mgpu(arg_types=(rows,) * (count + 1), return_type=[tile] * count)
    return call(functools.partial(_distances, columns, is_crossed, is_paired))(
        y_ref.at[n], *(x_ref.at[first + m] for m in range(count))
    )


def _distances(columns: int, is_crossed: bool, is_paired: bool, _, y_ref, *x_refs):
    """A loop over reads of four features; the sums of a thread go round with it."""
    warp, lane = swizzled_rows.thread()
    eighth, fourth = swizzled_rows.paired(lane, 4) if is_paired else (over(lane, 4), arith.remui(lane, integer(4)))
    row = arith.addi(arith.muli(warp, integer(16)), eighth)
    column = arith.muli(fourth, integer(2))
    zero = [wgmma_layout.real(0.0)] * (columns // 2)
    units = ir.MemRefType(y_ref.type).shape[0] * UNITS

    @utils.fori(integer(units), [list(zero) for _ in x_refs])
    def done(n, sums):
        place = over(n, UNITS), arith.remui(n, integer(UNITS))
        starts = [_pointer(x, row, place) for x in x_refs]
        near = [
            [swizzled_rows.read(swizzled_rows.below(start, 8 * r), None, is_crossed) for r in range(2)]
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
        total = _exchanged(total, lane) if is_paired else total
        return wgmma_layout.tile((64, columns), lambda _, e, c, r: total[4 * (c // 8) + 2 * r + e])

    return [tile(total) for total in done.results]


def _exchanged(sums: list[ir.Value], lane) -> list[ir.Value]:
    """From the lane whose `paired` row is this lane's over 4, and whose column is its remainder."""
    row, column = over(lane, 4), arith.remui(lane, integer(4))
    source = arith.addi(arith.muli(over(row, 2), integer(8)), arith.muli(column, integer(2)))
    source = arith.addi(source, arith.remui(row, integer(2)))
    return [_of_lane(source, x) for x in sums]


def _of_lane(source, x: ir.Value) -> ir.Value:
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
    return ptx.result(ir.F32Type.get(), text, [x, source], "=f,f,r", stays=True)


def _pointer(ref, row, place):
    chunk, unit = place
    return swizzled_rows.pointer(ref, chunk, row, unit)


def _size(x: list[ir.Value], y: list[ir.Value]) -> ir.Value:
    """sum |x - y|, in pairs: as many additions as one after another, and better rounded."""
    sizes = [math_dialect.absf(arith.subf(a, b)) for a, b in zip(x, y, strict=True)]
    while len(sizes) > 1:
        sizes = [arith.addf(a, b) for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
    return sizes[0]

"""sum_w max(x_iw, y_jw) of a tile of pairs in 16 bits, in wgmma's register layout: half of an L1 distance.

    sum_w |x - y| = 2 sum_w max(x, y) - sum_w x - sum_w y

A maximum of 16-bit numbers is exact, and one instruction finds two. The tensor cores add them up in float32: for a
row y_j the maxima with 16 rows of x are the left operand of mma.m16n8k16, and the right one has ones in column j
and zeros elsewhere, so that the results of eight rows of y fill one accumulator.
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

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import ptx, softmax, swizzled_rows, wgmma_layout
from pallas_kernels.parts.key_rows import over_rows
from pallas_kernels.parts.swizzled_rows import TRANSFORMS, over
from pallas_kernels.parts.wgmma_layout import integer

_PTX = {"bfloat16": ("bf16", 0x3F803F80), "float16": ("f16", 0x3C003C00)}  # the type, and two ones


def sums_of_maxima(x_ref, first, count: int, y_ref, n, interpret: Interpret) -> list[jax.Array]:
    """sum_w max(x_iw, y_jw) for the rows i of tiles first, first + 1, ... of x, and j of tile n of y.

    Both in one 16-bit dtype, see `swizzled_rows`, x in tiles of 64 rows, `crossed`. Returns `count` arrays float32
    [64, rows of y].
    """
    columns = y_ref.shape[2]
    if interpret is not None:
        x, y = swizzled_rows.values(x_ref, first, count, is_crossed=True), swizzled_rows.values(y_ref, n, 1)
        m = jnp.maximum(x[:, None], y[None]).sum(axis=-1)
        return [m[64 * t : 64 * (t + 1)] for t in range(count)]
    tile = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, plgpu.Layout.WGMMA)
    rows = plgpu.RefType(TRANSFORMS)
    call = plgpu.inline_mgpu(arg_types=(rows,) * (count + 1), return_type=[tile] * count)
    form = functools.partial(_sums, columns, jnp.dtype(y_ref.dtype).name)
    return call(form)(y_ref.at[n], *(x_ref.at[first + m] for m in range(count)))


def negative_distances(maxima: jax.Array, x_sums: jax.Array, y_sums: jax.Array) -> jax.Array:
    """-d of `sums_of_maxima` and of the sums of the features of the rows."""
    return softmax.over_columns(x_sums, maxima.shape) + over_rows(y_sums, maxima.shape) - 2.0 * maxima


def row_sums(x: jax.Array, length: int) -> jax.Array:
    """The sum of the features of each row of x [B, S, H, D], float32 [B, H, length]."""
    total = jnp.swapaxes(x.astype(jnp.float32).sum(axis=-1), 1, 2)
    return jnp.pad(total, ((0, 0), (0, 0), (0, length - x.shape[1])))


def _sums(columns: int, dtype: str, _, y_ref, *x_refs):
    """A loop over 32 features, eight for a thread; the sums go round with it.

    Rows of y come in the order 0, 8, 16, ..., 1, 9, ...: the next one adds to another accumulator.
    """
    warp, lane = swizzled_rows.thread()
    row = arith.addi(arith.muli(warp, integer(16)), over(lane, 4))
    ones = [_ones_if(arith.cmpi(arith.CmpIPredicate.eq, over(lane, 4), integer(n)), dtype) for n in range(8)]
    zero = [wgmma_layout.real(0.0)] * (columns // 2)

    @utils.fori(integer(2 * ir.MemRefType(y_ref.type).shape[0]), [list(zero) for _ in x_refs])
    def done(step, sums):
        unit = arith.addi(arith.muli(arith.remui(step, integer(2)), integer(4)), arith.remui(lane, integer(4)))
        place = functools.partial(swizzled_rows.pointer, chunk=over(step, 2), unit=unit)
        starts = [place(x, row=row) for x in x_refs]
        near = [[_read(swizzled_rows.below(start, 8 * r), is_crossed=True) for r in range(2)] for start in starts]
        for n in range(8):
            start = place(y_ref, row=integer(n))
            for j in range(columns // 8):
                far, at = _read(swizzled_rows.below(start, 8 * j)), slice(4 * j, 4 * j + 4)
                for (total, x), k in itertools.product(zip(sums, near, strict=True), (0, 2)):
                    left = [_maximum(x[r][k + i], far[k + i], dtype) for i in range(2) for r in range(2)]
                    total[at] = multiply(left, (ones[n], ones[n]), total[at], dtype)
        return sums

    def tile(total):
        return wgmma_layout.tile((64, columns), lambda _, e, c, r: total[4 * (c // 8) + 2 * r + e])

    return [tile(total) for total in done.results]


def _read(start, is_crossed: bool = False) -> list[ir.Value]:
    """Four pairs of features."""
    return swizzled_rows.read(start, ir.IntegerType.get_signless(32), is_crossed)


def _ones_if(condition, dtype: str):
    return arith.select(condition, integer(_PTX[dtype][1]), integer(0))


def _maximum(x, y, dtype: str):
    text = f"max.NaN.{_PTX[dtype][0]}x2 $0, $1, $2;"
    return ptx.result(x.type, text, [x, y], "=r,r,r")


def multiply(left, right, total, dtype: str) -> list:
    """total + left right, mma.m16n8k16's operands."""
    kind = _PTX[dtype][0]
    text = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
    text += "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    return ptx.results(ir.F32Type.get(), 4, text, [*left, *right, *total], constraints)

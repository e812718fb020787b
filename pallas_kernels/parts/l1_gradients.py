"""The way back through L1 distances, on the CUDA cores: sums of ds_ij sign(x_iw - y_jw) over j.

(sign(t) + 1) / 2 is one instruction, t 2^127 + 1/2 clipped to [0, 1], and exact at a tie, where it is 1/2. (Normal
numbers that differ by less than 2^-127 count as nearly a tie.) So a feature of a pair costs three, a subtraction,
that, and a multiplication and addition; `finish` doubles the sums and takes sum_j ds_ij away.

A thread has four rows and the features 4 (lane % 8) + {0, 1, 2, 3} of each chunk, so a warp has the same 16 rows as
in wgmma's layout, and ds changes hands in shared memory inside a warp.
"""

from __future__ import annotations

# inline_mgpu supplies the first argument of what it decorates.
# pyright: reportCallIssue=false
import itertools

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as math_dialect

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import ptx, swizzled_rows, wgmma_layout
from pallas_kernels.parts.swizzled_rows import TRANSFORMS, over
from pallas_kernels.parts.wgmma_layout import integer, real

WGMMA = plgpu.Layout.WGMMA
FOUR = 4  # features of one access
_ROWS = 4  # of a thread
_STRIDE = 68  # float32s from a column of ds to the next: no two threads of a warp meet in a bank
_UNROLLED = 768  # instructions of a pass of the loop, about


def memory_shape(columns: int) -> tuple[int, int]:
    """Of the float32 memory through which ds [64, columns] changes hands."""
    return columns * _STRIDE // 64, 64


def start(columns: int) -> jax.Array:
    """No sum yet, for 64 rows. What is in which register only this module knows."""
    return plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), WGMMA)


def add(sums: jax.Array, ds: jax.Array, memory, x_ref, m, y_ref, n, interpret: Interpret) -> jax.Array:
    """Adds ds [64, rows of y] times half of sign + 1, over the rows of tile n of y, for tile m of x.

    Both are tiles of `swizzled_rows`, x of 64 rows, `crossed`.
    """
    if interpret is not None:
        x, y = swizzled_rows.values(x_ref, m, 1, is_crossed=True), swizzled_rows.values(y_ref, n, 1)
        half = 0.5 * (1 + jnp.sign(x[:, None] - y[None]))
        return sums + (ds[:, :, None] * half).sum(axis=1)
    rows = plgpu.RefType(TRANSFORMS)
    call = plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA, plgpu.RefType(), rows, rows),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, WGMMA),
    )
    return call(_add)(sums, ds, memory, x_ref.at[m], y_ref.at[n])


def finish(sums: jax.Array, ds_sums: jax.Array, factor: float, memory, x_ref, m, interpret: Interpret) -> None:
    """Tile m of x becomes factor * sum_j ds_ij sign(x_iw - y_jw); ds_sums [64] is sum_j ds_ij."""
    if interpret is not None:
        _, chunks, rows, width = x_ref.shape
        result = factor * (2 * sums - ds_sums[:, None])
        x_ref[m] = jnp.swapaxes(result.reshape(rows, chunks, width), 0, 1)
        return
    memory[0] = ds_sums
    plgpu.commit_smem()
    call = plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(), plgpu.RefType(TRANSFORMS)))
    call(lambda _, sums, memory, x_ref: _finish(factor, sums, memory, x_ref))(sums, memory, x_ref.at[m])


def _add(_, sums, ds, memory, x_ref, y_ref):
    columns, chunks = ds.shape[1], ir.MemRefType(x_ref.type).shape[0]
    _write(ds, memory)
    row, four = _place()
    x = [
        [swizzled_rows.read(_pointer(x_ref, c, row, i, four), is_crossed=True) for i in range(_ROWS)]
        for c in range(chunks)
    ]
    ds_start = swizzled_rows.moved(utils.memref_ptr(memory), arith.muli(row, integer(4)))
    at_once = columns_at_once(columns, chunks)

    @utils.fori(integer(columns // at_once), wgmma_layout.scalars(sums))
    def done(step, totals):
        totals = list(totals)
        for s in range(at_once):
            j = arith.addi(arith.muli(step, integer(at_once)), integer(s))
            weights = swizzled_rows.read(swizzled_rows.moved(ds_start, arith.muli(j, integer(4 * _STRIDE))))
            for c in range(chunks):
                y = swizzled_rows.read(swizzled_rows.pointer(y_ref, integer(c), j, four))
                for i, e in itertools.product(range(_ROWS), range(FOUR)):
                    at = FOUR * (_ROWS * c + i) + e
                    half = _half_of_sign_and_one(arith.subf(x[c][i][e], y[e]))
                    totals[at] = math_dialect.fma(weights[i], half, totals[at])
        return totals

    return wgmma_layout.tile(sums.shape, lambda _, e, column, r: done.results[4 * (column // 8) + 2 * r + e])


def columns_at_once(columns: int, chunks: int) -> int:
    """Columns of ds of one pass of the loop: a divisor of them all, so that none is left over."""
    most = max(1, _UNROLLED // (3 * FOUR * _ROWS * chunks))
    return max(n for n in range(1, most + 1) if columns % n == 0)


def _write(ds, memory) -> None:
    """Registers of wgmma's layout -> memory, a column of ds behind the other, by a warp for itself."""
    warp, lane = swizzled_rows.thread()
    row = arith.addi(arith.muli(warp, integer(16)), over(lane, 4))
    column = arith.muli(arith.remui(lane, integer(4)), integer(2))
    offset = arith.addi(arith.muli(column, integer(_STRIDE)), row)
    base = swizzled_rows.moved(utils.memref_ptr(memory), arith.muli(offset, integer(4)))
    utils.warp_barrier()
    for n, register in enumerate(ds.registers.flat):
        j, r = divmod(n, 2)
        for e in range(2):
            further = (8 * j + e) * _STRIDE + 8 * r
            llvm.store(wgmma_layout.scalar(register, e), swizzled_rows.moved(base, 4 * further))
    utils.warp_barrier()


def _finish(factor: float, sums, memory, x_ref) -> None:
    row, four = _place()
    less = swizzled_rows.read(swizzled_rows.moved(utils.memref_ptr(memory), arith.muli(row, integer(4))))
    flat = wgmma_layout.scalars(sums)
    quad = ir.VectorType.get((FOUR,), ir.F32Type.get())
    for c in range(ir.MemRefType(x_ref.type).shape[0]):
        for i in range(_ROWS):
            first = FOUR * (_ROWS * c + i)
            twice = [arith.addf(total, total) for total in flat[first : first + FOUR]]
            result = [arith.mulf(arith.subf(x, less[i]), real(factor)) for x in twice]
            llvm.store(vector.from_elements(quad, result), _pointer(x_ref, c, row, i, four), alignment=4 * FOUR)


def _place():
    """The first of a thread's rows, and which four features of a chunk it has."""
    warp, lane = swizzled_rows.thread()
    row = arith.addi(arith.muli(warp, integer(16)), arith.muli(over(lane, 8), integer(_ROWS)))
    return row, arith.remui(lane, integer(8))


def _pointer(ref, chunk: int, row, i: int, four):
    return swizzled_rows.pointer(ref, integer(chunk), arith.addi(row, integer(i)), four)


def _half_of_sign_and_one(t: ir.Value) -> ir.Value:
    operands = [t, real(2.0**127), real(0.5)]
    return ptx.result(ir.F32Type.get(), "fma.rn.sat.f32 $0, $1, $2, $3;", operands, "=f,f,f,f")

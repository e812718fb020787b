"""Shared-memory tiles of float32 rows for the CUDA cores, filled by TMA.

A tile is cut into chunks of 32 columns, 128 bytes, under TMA's 128-byte swizzle: then threads that read the same
column of neighbouring rows, four features at a time, do not meet in a bank. TMA may start at any row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from pallas_kernels.parts import wgmma_layout
from pallas_kernels.parts.wgmma_layout import integer

CHUNK = 32
FOUR = 4  # features of one access
FOURS = CHUNK // FOUR
_ROW = 4 * CHUNK  # bytes
TRANSFORMS = (plgpu.SwizzleTransform(128),)


@dataclasses.dataclass(frozen=True)
class RowsType:
    """A stack of `count` tiles of rows x columns."""

    count: int
    rows: int
    columns: int

    @property
    def chunks(self) -> int:
        return -(-self.columns // CHUNK)

    @property
    def scratch(self):
        return plgpu.SMEM((self.count, self.chunks, self.rows, CHUNK), jnp.float32, transforms=TRANSFORMS)

    def load(self, ref, source, index, row, head, n, barrier) -> None:
        """Starts filling tile n with rows from `row` of source[index, :, head]; arrives `chunks` times.

        What lies outside of the source becomes 0.
        """
        for c in range(self.chunks):
            columns = pl.ds(row * 0 + c * CHUNK, CHUNK)  # no constant: it may reach past the end
            plgpu.copy_gmem_to_smem(source.at[index, pl.ds(row, self.rows), head, columns], ref.at[n, c], barrier)

    def store(self, ref, target, index, row, head, n) -> None:
        """Starts writing tile n to rows from `row` of target[index, :, head]; what lies outside is clipped."""
        for c in range(self.chunks):
            columns = pl.ds(row * 0 + c * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(ref.at[n, c], target.at[index, pl.ds(row, self.rows), head, columns])


def fit(x: jax.Array, rows: int) -> jax.Array:
    """x [B, S, H, D] in float32, padded to what TMA takes: at least a box, columns in 16 bytes."""
    columns = max(CHUNK, 4 * -(-x.shape[3] // 4))
    pad = ((0, 0), (0, max(0, rows - x.shape[1])), (0, 0), (0, columns - x.shape[3]))
    return jnp.pad(x.astype(jnp.float32), pad)


def values(ref: Any, n, count: int) -> jax.Array:
    """Tiles n to n + count as [count rows, columns], for the interpreter."""
    x = ref[pl.ds(n, count)]
    return jnp.swapaxes(x, 1, 2).reshape(count * x.shape[2], -1)


def thread() -> tuple[ir.Value, ir.Value]:
    """The number of a thread's warp in its warpgroup, and its own in the warp."""
    index = arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x))
    return over(arith.remui(index, integer(128)), 32), arith.remui(index, integer(32))


def pointer(ref, chunk, row, four) -> ir.Value:
    """Where four features of a row of a tile lie, in shared memory."""
    before = arith.addi(arith.muli(chunk, integer(ir.MemRefType(ref.type).shape[1])), row)
    swizzled = arith.muli(arith.xori(four, arith.remui(row, integer(8))), integer(4 * FOUR))
    return moved(utils.memref_ptr(ref), arith.addi(arith.muli(before, integer(_ROW)), swizzled))


def below(start: ir.Value, rows: int) -> ir.Value:
    """The pointer `rows` rows further on, a multiple of 8."""
    return moved(start, rows * _ROW)


def read(start: ir.Value) -> list[ir.Value]:
    """Four float32 in one access."""
    quad = ir.VectorType.get((FOUR,), ir.F32Type.get())
    found = llvm.load(quad, start, alignment=4 * FOUR)
    return [wgmma_layout.scalar(found, n) for n in range(FOUR)]


def moved(start: ir.Value, offset) -> ir.Value:
    """The pointer some bytes further on."""
    return utils.getelementptr(start, [offset], ir.IntegerType.get_signless(8))


def over(x: ir.Value, divisor: int) -> ir.Value:
    return arith.divui(x, integer(divisor))

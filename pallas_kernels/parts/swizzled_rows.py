"""Shared-memory tiles of rows for the CUDA cores, filled by TMA.

A tile is cut into chunks of 128 bytes of columns, under TMA's 128-byte swizzle: then threads that read the same
columns of neighbouring rows, 16 bytes at a time, do not meet in a bank. TMA may start at any row.
"""

from __future__ import annotations

# inline_mgpu supplies the first argument of what it decorates.
# pyright: reportCallIssue=false
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import wgmma_layout
from pallas_kernels.parts.wgmma_layout import integer

TRANSFORMS = (plgpu.SwizzleTransform(128),)
UNIT = 16  # bytes of one access
UNITS = 8  # of a row of a chunk
_ROW = UNIT * UNITS


@dataclasses.dataclass(frozen=True)
class RowsType:
    """A stack of `count` tiles of rows x columns."""

    count: int
    rows: int
    columns: int
    dtype: Any = jnp.float32

    @property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return _ROW // jnp.dtype(self.dtype).itemsize

    @property
    def chunks(self) -> int:
        return -(-self.columns // self.chunk)

    @property
    def scratch(self):
        return plgpu.SMEM((self.count, self.chunks, self.rows, self.chunk), self.dtype, transforms=TRANSFORMS)

    def load(self, ref, source, index, row, head, n, barrier, column=0) -> None:
        """Starts filling tile n from a row and column of source[index, :, head] on; arrives `chunks` times.

        What lies outside of the source becomes 0.
        """
        for c in range(self.chunks):
            columns = pl.ds(row * 0 + column + c * self.chunk, self.chunk)  # no constant: it may reach past the end
            plgpu.copy_gmem_to_smem(source.at[index, pl.ds(row, self.rows), head, columns], ref.at[n, c], barrier)

    def store(self, ref, target, index, row, head, n, column: int = 0, chunks: int | None = None) -> None:
        """Starts writing chunks of tile n to target[index, :, head], from a row and column on; clipped outside."""
        for c in range(self.chunks if chunks is None else chunks):
            columns = pl.ds(row * 0 + column + c * self.chunk, self.chunk)
            plgpu.copy_smem_to_gmem(ref.at[n, c], target.at[index, pl.ds(row, self.rows), head, columns])

    def write(self, ref, n, value: jax.Array, interpret: Interpret) -> None:
        """Registers of wgmma's layout [64, columns] -> the first chunks of tile n."""
        if interpret is not None:
            chunks = value.shape[1] // self.chunk
            ref[n, pl.ds(0, chunks)] = jnp.swapaxes(value.reshape(64, chunks, self.chunk), 0, 1)
            return
        call = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(TRANSFORMS)))
        call(functools.partial(_write, jnp.dtype(self.dtype).itemsize))(value, ref.at[n])

    def fit(self, x: jax.Array, rows: int) -> jax.Array:
        """x [B, S, H, D] in this dtype, padded to what TMA takes: at least a box of rows, columns in 16 bytes."""
        whole = UNIT // jnp.dtype(self.dtype).itemsize
        columns = max(self.chunk, whole * -(-x.shape[3] // whole))
        pad = ((0, 0), (0, max(0, rows - x.shape[1])), (0, 0), (0, columns - x.shape[3]))
        return jnp.pad(x.astype(self.dtype), pad)


def crossed(x: jax.Array) -> jax.Array:
    """Columns 1, 0, 3, 2, ... of x, or as many at once as fill a register in place of one.

    Even and odd registers lie in two banks, and 16 bytes are read into four in order. So the same columns of two rows
    lie in one bank, and an instruction on both waits for it, unless one of the rows is crossed.
    """
    return x.reshape(*x.shape[:-1], -1, 2, 4 // x.dtype.itemsize)[..., ::-1, :].reshape(x.shape)


def values(ref: Any, n, count: int, is_crossed: bool = False) -> jax.Array:
    """Tiles n to n + count as float32 [count rows, columns], for the interpreter; in order as `read` does it."""
    x = ref[pl.ds(n, count)]
    x = (crossed(x) if is_crossed else x).astype(jnp.float32)
    return jnp.swapaxes(x, 1, 2).reshape(count * x.shape[2], -1)


def _write(size: int, _, value, ref) -> None:
    """Pairs of columns of `size` bytes each."""
    warp, lane = thread()
    row = arith.addi(arith.muli(warp, integer(16)), over(lane, 4))
    inside = arith.muli(arith.remui(lane, integer(4)), integer(2 * size))
    for n, register in enumerate(value.registers.flat):
        j, r = divmod(n, 2)
        chunk, rest = divmod(8 * j * size, _ROW)
        unit = arith.addi(integer(rest // UNIT), over(inside, UNIT))
        start = below(pointer(ref, integer(chunk), row, unit), 8 * r)
        llvm.store(register, moved(start, arith.remui(inside, integer(UNIT))), alignment=2 * size)


def thread() -> tuple[ir.Value, ir.Value]:
    """The number of a thread's warp in its warpgroup, and its own in the warp."""
    index = arith.index_cast(ir.IntegerType.get_signless(32), gpu.thread_id(gpu.Dimension.x))
    return over(arith.remui(index, integer(128)), 32), arith.remui(index, integer(32))


def pointer(ref, chunk, row, unit) -> ir.Value:
    """Where a unit of a row of a chunk of a tile lies, in shared memory."""
    before = arith.addi(arith.muli(chunk, integer(ir.MemRefType(ref.type).shape[1])), row)
    swizzled = arith.muli(arith.xori(unit, arith.remui(row, integer(8))), integer(UNIT))
    return moved(utils.memref_ptr(ref), arith.addi(arith.muli(before, integer(_ROW)), swizzled))


def below(start: ir.Value, rows: int) -> ir.Value:
    """The pointer `rows` rows further on, a multiple of 8."""
    return moved(start, rows * _ROW)


def read(start: ir.Value, element: ir.Type | None = None, is_crossed: bool = False) -> list[ir.Value]:
    """A unit, as four float32 or what else has 32 bits, in order though it be `crossed` in memory."""
    quad = ir.VectorType.get((4,), element or ir.F32Type.get())
    found = llvm.load(quad, start, alignment=UNIT)
    return [wgmma_layout.scalar(found, n ^ is_crossed) for n in range(4)]


def moved(start: ir.Value, offset) -> ir.Value:
    """The pointer some bytes further on."""
    return utils.getelementptr(start, [offset], ir.IntegerType.get_signless(8))


def over(x: ir.Value, divisor: int) -> ir.Value:
    return arith.divui(x, integer(divisor))

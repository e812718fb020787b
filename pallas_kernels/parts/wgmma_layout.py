"""Where the registers of a thread stand in a tile of wgmma's accumulator layout, for code written in MLIR.

A thread holds columns 8 j + 2 (lane % 4) + {0, 1} of two rows; its registers, each a pair of columns, run over j,
then over the rows. So a column less `first_column()` is a constant, which costs no register.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, vector


def first_column() -> ir.Value:
    """The first column of this thread, int32."""
    return arith.muli(arith.remui(_thread(), integer(4)), integer(2))


def first_row() -> ir.Value:
    """The first of the two rows of this thread, which are 8 apart, int32."""
    thread = arith.remui(_thread(), integer(128))
    warp, lane = arith.divui(thread, integer(32)), arith.remui(thread, integer(32))
    return arith.addi(arith.muli(warp, integer(16)), arith.divui(lane, integer(4)))


def tile(shape: tuple[int, int], element: Callable[[tuple, int, int, int], ir.Value]) -> mgpu.FragmentedArray:
    """A float32 tile of element(index of the register, which of its pair, column less the first, row 0 or 1)."""
    layout = plgpu.Layout.WGMMA.to_mgpu()
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    for n, index in enumerate(np.ndindex(registers.shape)):
        j, row = divmod(n, 2)
        registers[index] = vector.from_elements(pair, [element(index, e, 8 * j + e, row) for e in range(2)])
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _thread() -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))


def integer(x: int) -> ir.Value:
    """A 32-bit constant, signed or unsigned."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, (x + 2**31) % 2**32 - 2**31))


def real(x: float) -> ir.Value:
    f32 = ir.F32Type.get()
    return arith.constant(f32, ir.FloatAttr.get(f32, x))


def scalar(register: ir.Value, e: int = 0) -> ir.Value:
    """Element e of a register."""
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([e]))


def scalars(x: mgpu.FragmentedArray) -> list[ir.Value]:
    """All elements of a thread, register after register."""
    return [scalar(register, e) for register in x.registers.flat for e in range(ir.VectorType(register.type).shape[0])]


@dataclasses.dataclass(frozen=True)
class Word:
    """A 32-bit register with the operators that uint32 has in jnp."""

    value: ir.Value

    def __add__(self, other) -> Word:
        return Word(arith.addi(self.value, _word(other)))

    def __mul__(self, other) -> Word:
        return Word(arith.muli(self.value, _word(other)))

    def __xor__(self, other) -> Word:
        return Word(arith.xori(self.value, _word(other)))

    def __rshift__(self, other) -> Word:
        return Word(arith.shrui(self.value, _word(other)))

    def __ge__(self, other) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.uge, self.value, _word(other))


def _word(x) -> ir.Value:
    return x.value if isinstance(x, Word) else integer(int(x))

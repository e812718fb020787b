"""Runs code that emits MLIR for a warpgroup with numpy in its place: a value is an array of 128 threads.

What an instruction does to the registers of a warp is written down here from the PTX manual. So what a thread reads,
and which of its registers means what, is tested without a GPU; that the compiler keeps it so is not.
"""

from __future__ import annotations

import contextlib
import itertools
import types
from unittest import mock

import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.parts import l1_distances, l1_gradients, l1_maxima, l1_signs, swizzled_rows, wgmma_layout

THREADS, LANES = 128, 32
FREE = 1 << 20  # bytes of shared memory


class Value(np.ndarray):
    """Of each thread a number, or a few; with a type, as MLIR's values have."""

    @property
    def type(self):
        return ir.F32Type.get() if self.dtype == np.float32 else ir.IntegerType.get_signless(32)


def value(x, dtype=None) -> Value:
    x = np.asarray(x, dtype)
    return np.array(np.broadcast_to(x, (THREADS, *x.shape[1:]))).view(Value)


class Memory:
    """The shared memory of a CTA."""

    def __init__(self):
        self.bytes, self.used = np.zeros(FREE, np.uint8), 0

    def tile(self, x: np.ndarray) -> types.SimpleNamespace:
        """A copy of rows x columns in chunks of 128 bytes, swizzled as TMA does."""
        raw = np.ascontiguousarray(x).view(np.uint8)
        rows, chunks = raw.shape[0], raw.shape[1] // 128
        ref = self.flat(chunks * rows * 128, (chunks, rows, 128 // x.itemsize))
        self.bytes[ref.at + self.places(rows, chunks)] = raw
        return ref

    def flat(self, size: int, shape: tuple[int, ...]) -> types.SimpleNamespace:
        """Room for something that code refers to by a ref of a shape."""
        at, self.used = self.used, self.used + -(-size // 1024) * 1024
        return types.SimpleNamespace(at=at, type=ir.MemRefType.get(shape, ir.F32Type.get()))

    def read_tile(self, ref, rows: int, chunks: int, dtype) -> np.ndarray:
        return self.bytes[ref.at + self.places(rows, chunks)].view(dtype)

    @staticmethod
    def places(rows: int, chunks: int) -> np.ndarray:
        row, byte = np.arange(rows)[:, None], np.arange(128 * chunks)[None]
        return (byte // 128 * rows + row) * 128 + (byte % 128 ^ row % 8 * 16)

    def load(self, element, at: Value, alignment: int) -> Value:
        vector = isinstance(element, ir.VectorType)
        count, element = (element.shape[0], element.element_type) if vector else (1, element)
        assert np.all(at % alignment == 0)
        found = self.bytes[at[:, None] + np.arange(4 * count)].view(
            np.float32 if element == ir.F32Type.get() else np.int32
        )
        return value(found if vector else found[:, 0])

    def store(self, x: Value, at: Value, alignment: int = 4) -> None:
        assert np.all(at % alignment == 0)
        raw = np.ascontiguousarray(x.reshape(THREADS, -1)).view(np.uint8)
        self.bytes[at[:, None] + np.arange(raw.shape[1])] = raw

    def matrices(self, at: Value) -> list[Value]:
        """ldmatrix.x4: lane l has the address of row l % 8 of matrix l / 8."""
        warps = self.bytes[at.reshape(-1, 4, 8, 1) + np.arange(16)].view(np.int32)  # [warp, matrix, row, pair]
        return [value(warps[:, n].reshape(THREADS)) for n in range(4)]


def pairs(x: Value, dtype) -> np.ndarray:
    """[128, 2] of registers that hold two."""
    return np.ascontiguousarray(x, np.int32).view(dtype).reshape(THREADS, 2)


def packed(x: np.ndarray) -> Value:
    return value(np.ascontiguousarray(x).view(np.int32).reshape(THREADS))


def multiply(left: list[Value], right: list[Value], total: list[Value], dtype) -> list[Value]:
    """mma.m16n8k16: registers and elements as the PTX manual draws them."""
    lane = np.arange(THREADS)
    warp, group, four = lane // LANES, lane % LANES // 4, lane % 4
    a, b, c = np.zeros((4, 16, 16)), np.zeros((4, 16, 8)), np.zeros((4, 16, 8), np.float32)
    for n, e in itertools.product(range(4), range(2)):
        a[warp, group + 8 * (n % 2), 2 * four + e + 8 * (n // 2)] = pairs(left[n], dtype)[:, e]
        c[warp, group + 8 * (n // 2), 2 * four + n % 2] = total[n]
    for n, e in itertools.product(range(2), range(2)):
        b[warp, 2 * four + e + 8 * n, group] = pairs(right[n], dtype)[:, e]
    c += (a @ b).astype(np.float32)
    return [value(c[warp, group + 8 * (n // 2), 2 * four + n % 2]) for n in range(4)]


def instruction(memory: Memory, text: str, operands):
    for of, name in ((jnp.bfloat16, "bf16"), (np.float16, "f16")):
        if f"max.NaN.{name}x2" in text:
            return packed(np.maximum(*(pairs(x, of) for x in operands)))
        if f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32" in text:
            return multiply(operands[:4], operands[4:6], operands[6:], of)
    if "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in text:
        return memory.matrices(operands[0])
    if "fma.rn.sat.f32" in text:
        t, scale, shift = (np.float64(x) for x in operands)
        return value(np.clip(t * scale + shift, 0, 1), np.float32)
    if all(part in text for part in ("add.s16x2 t, $1, $2;", "min.relu.s16x2 t, t, $3;", "mul.rn.bf16x2 $0, t, $4;")):
        x, y, most = (pairs(x, np.int16) for x in operands[:3])
        bits = np.maximum(np.minimum(x + y, most), 0)
        return packed(
            (bits.view(jnp.bfloat16).astype(np.float64) * pairs(operands[3], jnp.bfloat16)).astype(jnp.bfloat16)
        )
    raise NotImplementedError(text)


def loop(bound, carry):
    def run(body):
        results = carry
        for n in range(int(bound[0])):
            results = body(value([n], np.int32), results)
        return types.SimpleNamespace(results=results)

    return run


@contextlib.contextmanager
def running(memory: Memory):
    """The modules of L1 in which to call what emits MLIR."""
    lanes = np.arange(THREADS)
    stand_ins = {
        "arith": types.SimpleNamespace(
            **{"addi": np.add, "muli": np.multiply, "remui": np.remainder, "divui": np.floor_divide},
            **{"xori": np.bitwise_xor, "addf": np.add, "subf": np.subtract, "mulf": np.multiply},
            **{"cmpi": lambda _, x, y: x == y, "CmpIPredicate": arith.CmpIPredicate},
            select=lambda condition, x, y: value(np.where(condition, x, y)),
        ),
        "llvm": types.SimpleNamespace(
            **{"load": memory.load, "store": memory.store, "bitcast": lambda _, x: x, "ptrtoint": lambda _, x: x},
        ),
        "ptx": types.SimpleNamespace(
            result=lambda _, text, operands, *args, **kwargs: instruction(memory, text, operands),
            results=lambda _, count, text, operands, *args, **kwargs: instruction(memory, text, operands),
        ),
        "utils": types.SimpleNamespace(
            **{"fori": loop, "warp_barrier": lambda: None, "memref_ptr": lambda ref: value([ref.at], np.int64)},
            getelementptr=lambda at, offsets, _: at + offsets[0],
        ),
        "math_dialect": types.SimpleNamespace(absf=np.abs, fma=lambda x, y, z: x * y + z),
        "vector": types.SimpleNamespace(from_elements=lambda _, x: np.stack(x, axis=1)),
        "integer": lambda x: value([x], np.int32),
        "real": lambda x: value([x], np.float32),
        "scalar": lambda register, e=0: register if register.ndim == 1 else register[:, e],
        "scalars": lambda x: [register[:, e] for register in x.registers.flat for e in range(2)],
        "thread": lambda: (value(lanes // LANES, np.int32), value(lanes % LANES, np.int32)),
        "tile": lambda shape, element: tile(shape, element),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(ir.Context())
        stack.enter_context(ir.Location.unknown())
        modules = l1_distances, l1_gradients, l1_maxima, l1_signs, swizzled_rows, wgmma_layout
        for module, (name, stand_in) in itertools.product(modules, stand_ins.items()):
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, stand_in))
        yield


def registers(x: np.ndarray, dtype=np.float32) -> types.SimpleNamespace:
    """[64, columns] in wgmma's layout: pairs of columns, float32 or packed in 16 bits."""
    lane = np.arange(THREADS)
    row, column = lane // LANES * 16 + lane % LANES // 4, 2 * (lane % 4)
    found = np.empty(x.shape[1] // 4, object)
    for n in range(len(found)):
        j, r = divmod(n, 2)
        both = np.stack([x[row + 8 * r, column + 8 * j + e] for e in range(2)], axis=1).astype(dtype)
        found[n] = value(both) if dtype == np.float32 else packed(both)
    return types.SimpleNamespace(registers=found, shape=x.shape)


def tile(shape, element) -> types.SimpleNamespace:
    """What `wgmma_layout.tile` makes."""
    found = np.empty(shape[1] // 4, object)
    for n in range(len(found)):
        j, r = divmod(n, 2)
        found[n] = value(np.stack([element((), e, 8 * j + e, r) for e in range(2)], axis=1))
    return types.SimpleNamespace(registers=found, shape=shape)


def array(x) -> np.ndarray:
    """Registers of wgmma's layout -> [64, columns]."""
    lane = np.arange(THREADS)
    row, column = lane // LANES * 16 + lane % LANES // 4, 2 * (lane % 4)
    found = np.zeros(x.shape, np.float32)
    for n, register in enumerate(x.registers):
        j, r = divmod(n, 2)
        for e in range(2):
            found[row + 8 * r, column + 8 * j + e] = register[:, e]
    return found

"""Float32 tiles stored in the order in which wgmma's registers hold them.

A thread's registers go out four at a time, with no shuffles and no bank conflicts; whoever reads the tile
back with `from_memory` gets the same registers, so the order on the way never matters.
"""

from __future__ import annotations

# inline_mgpu supplies the first argument of what it decorates.
# pyright: reportCallIssue=false
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import _compat
from pallas_kernels._compat import Interpret
from pallas_kernels.parts import ptx, wgmma_layout

WGMMA = plgpu.Layout.WGMMA
_WIDTH = 256
_LANES = 4  # float32s in one 16-byte access
_THREADS = 128  # of a warpgroup


def memory_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of the memory that holds a rows x columns tile."""
    return rows * columns // _WIDTH, _WIDTH


def to_memory(x: jax.Array, interpret: Interpret) -> jax.Array:
    """Registers of a tile [rows, columns] -> the value to store at a ref of `memory_shape`."""
    shape = memory_shape(*x.shape)
    if interpret is not None:
        return x.reshape(shape)
    layout = _strided(shape)

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout))
    def relabel(_, x):
        quads = ir.VectorType.get((_LANES,), ir.F32Type.get())
        flat = wgmma_layout.scalars(x)
        groups = [flat[n : n + _LANES] for n in range(0, len(flat), _LANES)]
        registers = np.empty(len(groups), dtype=object)
        registers[:] = [vector.from_elements(quads, group) for group in groups]
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return relabel(x)


def from_memory(ref, rows: int, columns: int, interpret: Interpret) -> jax.Array:
    """A tile stored by `to_memory`, in registers of wgmma's layout."""
    shape = memory_shape(rows, columns)
    if interpret is not None:
        return ref[...].reshape(rows, columns)
    layout = _strided(shape)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((rows, columns), jnp.float32, WGMMA))
    def relabel(_, x):
        pairs = ir.VectorType.get((2,), ir.F32Type.get())
        flat = wgmma_layout.scalars(x)
        form = WGMMA.to_mgpu()
        registers = np.empty(form.registers_shape((rows, columns)), dtype=object)
        for n, index in enumerate(np.ndindex(registers.shape)):
            registers[index] = vector.from_elements(pairs, flat[2 * n : 2 * n + 2])
        return mgpu.FragmentedArray(_registers=registers, _layout=form, _is_signed=None)

    return relabel(_compat.load(ref, layout))


def add(target, x: jax.Array, staging, interpret: Interpret) -> None:
    """Adds a tile to a ref in global memory that is in register order, straight from registers.

    The interpreter has no such instruction and goes through `staging`, shared memory of `memory_shape`.
    """
    if interpret is not None:
        staging[...] = to_memory(x, interpret)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, target, reduction_op="add")
        plgpu.wait_smem_to_gmem(0)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA))
    def reduce(_, target, x):
        i32 = ir.IntegerType.get_signless(32)
        quad = arith.constant(i32, ir.IntegerAttr.get(i32, _LANES))
        thread = arith.remui(utils.thread_idx(), arith.constant(i32, ir.IntegerAttr.get(i32, _THREADS)))
        start = utils.getelementptr(utils.memref_ptr(target), [arith.muli(thread, quad)], ir.F32Type.get())
        flat = wgmma_layout.scalars(x)
        for n in range(0, len(flat), _LANES):
            text = f"red.global.add.v4.f32 [$0+{4 * _THREADS * n}], {{$1, $2, $3, $4}};"
            operands = [start, *flat[n : n + _LANES]]
            ptx.effect(text, operands, "l,f,f,f,f")

    reduce(target, x)


def _strided(shape: tuple[int, int]):
    return plgpu.Layout.WG_STRIDED(shape, vec_size=_LANES)

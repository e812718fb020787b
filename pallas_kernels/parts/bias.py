"""A bias on a tile of scores in wgmma's register layout, and its gradient.

Threads read what they need straight from global memory, and add gradients there: no shared memory, no barrier, and
an axis over which the bias broadcasts has a stride of 0. Rows are queries, or with `transposed` keys.
"""

from __future__ import annotations

# inline_mgpu supplies the first argument of what it decorates.
# pyright: reportCallIssue=false
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import ptx, softmax, wgmma_layout
from pallas_kernels.parts.masking import WGMMA
from pallas_kernels.problem import AttentionArrays, AttentionProblem

_DTYPES = ("float32", "bfloat16", "float16")


def inputs(a: AttentionArrays, rows: int, columns: int) -> dict[str, jax.Array]:
    """The bias, padded to whole tiles of rows x columns: as it is where lengths are multiples of those."""
    if a.bias is None:
        return {}
    bias = a.bias if a.bias.dtype.name in _DTYPES else a.bias.astype(jnp.float32)
    return {"bias_gmem": jnp.pad(bias, _tails(a.bias.shape, rows, columns))}


def is_shared(p: AttentionProblem) -> bool:
    """Whether all batch entries read one bias, so that L2 should have it while they do."""
    return p.B > 1 and p.bias_shape is not None and p.bias_shape[0] == 1


def zeros(p: AttentionProblem, rows: int, columns: int) -> jax.Array | None:
    """What a kernel adds the gradient into: float32, padded as the bias is; None if it has nothing to add."""
    if not p.bias_gradient or p.bias_shape is None or p.bias_shape[3] == 1:
        return None
    tails = _tails(p.bias_shape, rows, columns)
    return jnp.zeros([n + tail for n, (_, tail) in zip(p.bias_shape, tails, strict=True)], jnp.float32)


def staging(p: AttentionProblem, consumers: int, rows: int, columns: int, interpret: Interpret) -> dict[str, Any]:
    """Scratch of the interpreter, which cannot add from registers."""
    if interpret is None or zeros(p, rows, columns) is None:
        return {}
    return {"d_bias_smem": plgpu.SMEM((consumers, rows if _has_rows(p) else 1, columns), jnp.float32)}


def tile(gmem, b, h, query, key, shape: tuple[int, int], transposed: bool, interpret: Interpret):
    """The bias of scores [shape] from that query and key on, float32; None if there is none."""
    if gmem is None:
        return None
    queries, keys = shape[::-1] if transposed else shape
    part = _part(gmem, b, h, query, queries, key, keys)
    if interpret is not None:
        x = part[...].astype(jnp.float32)
        return jnp.broadcast_to(x.T if transposed else x, shape)
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, WGMMA)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(
        functools.partial(_load, shape, transposed)
    )(part)


def add(p: AttentionProblem, gmem, staging_smem, b, h, query, key, ds: jax.Array, interpret: Interpret) -> None:
    """Adds dS^T [keys, queries] from that query and key on to the gradient."""
    keys, queries = ds.shape
    part = _part(gmem, b, h, query, queries, key, keys)
    if interpret is not None:
        staging_smem[...] = ds.T if _has_rows(p) else ds.sum(axis=1)[None]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging_smem, part, reduction_op="add")
        plgpu.wait_smem_to_gmem(0)
    elif _has_rows(p):
        alone = p.bias_shape is not None and p.bias_shape[:2] == (p.B, p.H)
        write = functools.partial(_add_tile, "st.global.f32" if alone else "red.global.add.f32")
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA))(write)(part, ds)
    else:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), softmax.ROWS))(_add_rows)(part, ds.sum(axis=1))


def gradient(p: AttentionProblem, d_bias: jax.Array | None, a: AttentionArrays, lse2, delta, d_lse) -> jax.Array | None:
    """The gradient in the shape and dtype of the bias, from what the kernel has added up."""
    if not p.bias_gradient or p.bias_shape is None or a.bias is None:
        return None
    if d_bias is None:
        d_bias = _of_rows(p, a.sinks, lse2[:, :, : p.Sq], delta[:, :, : p.Sq], d_lse)
    return d_bias[:, :, : p.bias_shape[2], : p.bias_shape[3]].astype(a.bias.dtype)


def _of_rows(p: AttentionProblem, sinks, lse2, delta, d_lse) -> jax.Array:
    """Of one number for all keys of a row, which only lse and sinks feel: sum_j dS_ij = dlse_i + delta_i P_i(sink)."""
    d_bias = jnp.where(lse2 == jnp.inf, 0.0, d_lse)
    if sinks is not None:
        d_bias += delta * jnp.exp2(sinks[:, :, None].astype(jnp.float32) * softmax.LOG2E - lse2)
    assert p.bias_shape is not None
    axes = tuple(n for n in range(3) if p.bias_shape[n] == 1)
    return d_bias.sum(axis=axes, keepdims=True)[..., None]


def _has_rows(p: AttentionProblem) -> bool:
    return p.bias_shape is not None and p.bias_shape[2] > 1


def _tails(shape, rows: int, columns: int) -> list[tuple[int, int]]:
    return [
        (0, 0),
        (0, 0),
        *((0, -n % size if n > 1 else 0) for n, size in zip(shape[2:], (rows, columns), strict=True)),
    ]


def _part(gmem, b, h, query, queries: int, key, keys: int):
    """A view [queries|1, keys|1]."""
    B, H, Sq, Sk = gmem.shape
    rows, columns = (
        pl.ds(0, 1) if n == 1 else pl.ds(at, size) for n, at, size in ((Sq, query, queries), (Sk, key, keys))
    )
    return gmem.at[0 if B == 1 else b, 0 if H == 1 else h, rows, columns]


def _strides(part) -> list[int]:
    """Of rows and columns, in elements."""
    kind = ir.MemRefType(part.type)
    strides, _ = kind.get_strides_and_offset()
    return [0 if n == 1 else stride for n, stride in zip(kind.shape, strides, strict=True)]


def _start(part, row_stride: int, column_stride: int):
    """Where this thread's first row and first column are."""
    row = arith.muli(wgmma_layout.first_row(), wgmma_layout.integer(row_stride))
    column = arith.muli(wgmma_layout.first_column(), wgmma_layout.integer(column_stride))
    return utils.getelementptr(utils.memref_ptr(part), [arith.addi(row, column)], ir.MemRefType(part.type).element_type)


def _load(shape: tuple[int, int], transposed: bool, _, part):
    """Once for each element that differs, two at a time where neighbours are neighbours in memory."""
    row_stride, column_stride = _strides(part)[::-1] if transposed else _strides(part)
    kind = ir.MemRefType(part.type).element_type
    width = 2 if column_stride == 1 else 1
    start = _start(part, row_stride, column_stride)

    @functools.cache
    def read(offset: int):
        at = utils.getelementptr(start, [offset], kind)
        x = llvm.load(ir.VectorType.get((width,), kind), at)
        return x if kind == ir.F32Type.get() else arith.extf(ir.VectorType.get((width,), ir.F32Type.get()), x)

    def element(index, e, column, row):
        if width == 2:
            return wgmma_layout.scalar(read(8 * row * row_stride + column - e), e)
        return wgmma_layout.scalar(read(8 * row * row_stride + column * column_stride))

    return wgmma_layout.tile(shape, element)


def _add_tile(instruction: str, _, part, ds) -> None:
    column_stride, row_stride = _strides(part)
    start = _start(part, row_stride, column_stride)
    for n, register in enumerate(ds.registers.flat):
        j, row = divmod(n, 2)
        for e in range(2):
            offset = 4 * (8 * row * row_stride + (8 * j + e) * column_stride)
            operands = [start, wgmma_layout.scalar(register, e)]
            ptx.effect(f"{instruction} [$0+{offset}], $1;", operands, "l,f")


def _add_rows(_, part, sums) -> None:
    """Four threads hold the sum of a row, and one adds it."""
    _, row_stride = _strides(part)
    start = _start(part, row_stride, 0)
    for row, register in enumerate(sums.registers.flat):
        text = f"{{ .reg .pred p; setp.eq.u32 p, $2, 0; @p red.global.add.f32 [$0+{32 * row * row_stride}], $1; }}"
        ptx.effect(text, [start, wgmma_layout.scalar(register), wgmma_layout.first_column()], "l,f,r")

"""Hiding scores by position, in wgmma's register layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, vector

from pallas_kernels._compat import Interpret
from pallas_kernels.parts.softmax import ROWS

WGMMA = plgpu.Layout.WGMMA


def hide_columns(s: jax.Array, low: jax.Array | None, high: jax.Array, interpret: Interpret) -> jax.Array:
    """Scores s [rows, columns] with -inf wherever a column is not in [low, high] of its row, both int32 [rows]."""
    bounds = (high,) if low is None else (high, low)
    if interpret is not None:
        column = lax.broadcasted_iota(jnp.int32, s.shape, 1)
        seen = column <= high[:, None]
        return jnp.where(seen if low is None else seen & (column >= low[:, None]), s, -jnp.inf)
    call = plgpu.inline_mgpu(
        arg_types=(WGMMA, *(ROWS for _ in bounds)),
        return_type=plgpu.ShapeDtypeStruct(s.shape, s.dtype, WGMMA),
    )
    return call(_hide_columns)(s, *bounds)


def _hide_columns(_, s, high, low=None):
    """Each comparison is with a constant, so that it costs one instruction and no register.

    A thread holds columns 8 j + 2 (lane % 4) + {0, 1} of two rows; registers run over j, then over the rows.
    """
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x))
    first = arith.muli(arith.remui(thread, _constant(4, i32)), _constant(2, i32))
    high = [arith.subi(_scalar(x), first) for x in high.registers.flat]
    low = low if low is None else [arith.subi(_scalar(x), first) for x in low.registers.flat]
    hidden = arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), -np.inf))
    registers = np.empty_like(s.registers)
    for n, (index, register) in enumerate(np.ndenumerate(s.registers)):
        j, row = divmod(n, 2)
        kept = []
        for e in range(2):
            column = _constant(8 * j + e, i32)
            seen = arith.cmpi(arith.CmpIPredicate.sle, column, high[row])
            if low is not None:
                seen = arith.andi(seen, arith.cmpi(arith.CmpIPredicate.sge, column, low[row]))
            kept.append(arith.select(seen, _scalar(register, e), hidden))
        registers[index] = vector.from_elements(register.type, kept)
    return mgpu.FragmentedArray(_registers=registers, _layout=s.layout, _is_signed=None)


def _constant(x: int, type_: ir.Type) -> ir.Value:
    return arith.constant(type_, ir.IntegerAttr.get(type_, x))


def _scalar(register: ir.Value, e: int = 0) -> ir.Value:
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([e]))

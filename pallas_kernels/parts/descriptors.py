"""Keeping wgmma's operand descriptors out of the way of the accumulators.

A descriptor that does not change in a loop is hoisted out of it. With eight for every operand they fill the
uniform registers, are parked in the registers of the accumulators or in local memory, and each wgmma waits
for its own to come back. Formed again at each step, a descriptor costs an addition.
"""

from __future__ import annotations

# inline_mgpu supplies the first argument of what it decorates.
# pyright: reportCallIssue=false
import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import ptx


def zero_at(step: jax.Array, interpret: Interpret) -> jax.Array:
    """0, as far as the compiler knows another number at each step: an index for what should not be hoisted.

    Kernels have one-dimensional grids, so it is step * (gridDim.z - 1).
    """
    if interpret is not None:
        return step * 0

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT),
    )
    def multiply(_, step):
        i32 = ir.IntegerType.get_signless(32)
        depth = ptx.result(i32, "mov.u32 $0, %nctaid.z;", [], "=r")
        one = arith.constant(i32, ir.IntegerAttr.get(i32, 1))
        product = arith.muli(step.registers[()], arith.subi(depth, one))
        return mgpu.FragmentedArray.splat(product, (), is_signed=True)

    return multiply(step)

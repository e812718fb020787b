"""Softcap, bias and ALiBi on a tile of scores in wgmma's register layout, whichever way round the tile lies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import ptx, wgmma_layout
from pallas_kernels.parts.softmax import LOG2E
from pallas_kernels.problem import AttentionProblem


class Scores(NamedTuple):
    """Scores s in units of 1 / factor in base 2, and what dS is to be multiplied by, None where that is 1."""

    s: jax.Array
    factor: float
    slope: jax.Array | None


def modify(
    p: AttentionProblem,
    products: jax.Array,
    far: Callable[[], jax.Array] | None,
    interpret: Interpret,
    bias: jax.Array | None = None,
) -> Scores:
    """softcap(scale q k^T) + bias - far() from the products q k^T [rows, columns]; far: see `alibi`.

    A plain call multiplies nothing: its scale is the factor.
    """
    s, unit, slope = products, p.scale, None
    if p.softcap is not None:
        raised = jnp.exp2(products * (p.scale * 2.0 * LOG2E / p.softcap))
        s, unit = 1.0 - _two_over(1.0 + raised, interpret), p.softcap  # tanh; tanh.approx has 10 bits less
        slope = 1.0 - s * s
    if bias is None and not p.alibi:
        return Scores(s, unit * LOG2E, slope)
    s = s * unit
    if bias is not None:
        s = s + bias
    if p.alibi and far is not None:
        s = s - far()
    return Scores(s, LOG2E, slope)


def _two_over(x: jax.Array, interpret: Interpret) -> jax.Array:
    """2 / x for x >= 1: one instruction, where a division must mind small and large numbers."""
    if interpret is not None:
        return 2.0 / x
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, plgpu.Layout.WGMMA)
    call = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    return 2.0 * call(functools.partial(_reciprocals, x.shape))(x)


def _reciprocals(shape: tuple[int, int], _, x):
    def element(index, e, *_):
        operand = wgmma_layout.scalar(x.registers[index], e)
        return ptx.result(ir.F32Type.get(), "rcp.approx.ftz.f32 $0, $1;", [operand], "=f,f")

    return wgmma_layout.tile(shape, element)

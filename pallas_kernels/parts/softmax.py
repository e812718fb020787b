"""Online softmax over rows in wgmma's register layout, in base 2.

A row keeps `top`, the largest score so far or little less, and `total`, the sum of 2^(score - top).
"""

from __future__ import annotations

# inline_mgpu supplies the first argument of what it decorates.
# pyright: reportCallIssue=false
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import ptx, wgmma_layout

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
ROWS = plgpu.Layout.WGMMA.reduce(1)
_GROUP = 8  # columns of wgmma's layout over which four threads share a row
_HEAVIER = 8.0  # in powers of 2


class Softmax(NamedTuple):
    top: jax.Array  # [rows]
    total: jax.Array  # [rows, 8] of which a thread sums its own columns: the sum over all comes at the end


def start(rows: int, top=-jnp.inf, total: float = 0.0) -> Softmax:
    """Before any key, or with one score of `top` (a sink)."""
    totals = plgpu.layout_cast(jnp.full((rows, _GROUP), total / _GROUP, jnp.float32), plgpu.Layout.WGMMA)
    return Softmax(row_values(top, rows), totals)


def step(state: Softmax, s: jax.Array, factor: float, guarded: bool, lazy: bool = False):
    """Takes scores `factor * s`. Returns the new state, the weights, and what to multiply earlier sums by.

    guarded: rows may be all -inf so far (masked), which would make inf - inf.
    lazy: `top` follows the largest score only when that is 2^8 times as heavy, so that earlier sums seldom fade.
    """
    top = jnp.maximum(state.top, _grouped(s, jnp.maximum).max(axis=1) * factor)
    if lazy:
        top = jnp.where(top > state.top + _HEAVIER, top, state.top)
    safe = jnp.where(top == -jnp.inf, 0.0, top) if guarded else top
    weights = jnp.exp2(s * factor - over_columns(safe, s.shape))
    fade = jnp.exp2(state.top - safe)
    total = state.total * over_columns(fade, state.total.shape) + _grouped(weights, jnp.add)
    return Softmax(top, total), weights, fade


def faded(acc: jax.Array, fade: jax.Array, lazy: bool, interpret: Interpret) -> jax.Array:
    """acc * fade, by rows; a warp whose rows do not fade jumps over it if `lazy`."""

    def multiply(acc):
        return acc * over_columns(fade, acc.shape)

    return lax.cond(_any_fades(fade, interpret), multiply, lambda acc: acc, acc) if lazy else multiply(acc)


def finish(state: Softmax) -> tuple[jax.Array, jax.Array]:
    """1 / total, 0 for a row that saw no key, and the natural-log lse, -inf for such a row."""
    total = state.total.sum(axis=1)
    some = total > 0.0
    inverse = jnp.where(some, 1.0 / jnp.where(some, total, 1.0), 0.0)
    return inverse, (state.top + jnp.log2(total)) * LN2


def _grouped(x: jax.Array, combine) -> jax.Array:
    """Columns [rows, n] combined to [rows, 8], where each stays with its thread: four chains side by side."""
    return functools.reduce(combine, (x[:, n : n + _GROUP] for n in range(0, x.shape[1], _GROUP)))


def _any_fades(fade: jax.Array, interpret: Interpret) -> jax.Array:
    """Whether a row of this warp has a fade other than 1."""
    if interpret is not None:
        return (fade != 1.0).any()

    @plgpu.inline_mgpu(arg_types=(ROWS,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT))
    def vote(_, fade):
        text = """{ .reg .pred p, q;
            setp.ne.f32 p, $1, 0f3F800000;  setp.ne.or.f32 p, $2, 0f3F800000, p;
            vote.sync.any.pred q, p, -1;  selp.s32 $0, 1, 0, q; }"""
        first, second = (wgmma_layout.scalar(register, 0) for register in fade.registers.flat)
        i32 = ir.IntegerType.get_signless(32)
        found = ptx.result(i32, text, [first, second], "=r,f,f", stays=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return vote(fade) != 0


def over_columns(x: jax.Array, shape) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])


def row_values(x, rows: int, dtype=jnp.float32) -> jax.Array:
    return plgpu.layout_cast(jnp.full((rows,), x, dtype), ROWS)

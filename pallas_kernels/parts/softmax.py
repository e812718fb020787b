"""Online softmax over rows in wgmma's register layout, in base 2.

A row keeps `top`, the largest score so far, and `total`, the sum of 2^(score - top).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
ROWS = plgpu.Layout.WGMMA.reduce(1)


class Softmax(NamedTuple):
    top: jax.Array  # [rows]
    total: jax.Array  # [rows]


def start(rows: int, top=-jnp.inf, total: float = 0.0) -> Softmax:
    """Before any key, or with one score of `top` (a sink)."""
    return Softmax(*(row_values(x, rows) for x in (top, total)))


def step(state: Softmax, s: jax.Array, factor: float, guarded: bool) -> tuple[Softmax, jax.Array, jax.Array]:
    """Takes scores `factor * s`. Returns the new state, the weights, and what to multiply earlier sums by.

    guarded: rows may be all -inf so far (masked), which would make inf - inf.
    """
    top = jnp.maximum(state.top, s.max(axis=1) * factor)
    safe = jnp.where(top == -jnp.inf, 0.0, top) if guarded else top
    weights = jnp.exp2(s * factor - over_columns(safe, s.shape))
    fade = jnp.exp2(state.top - safe)
    return Softmax(top, state.total * fade + weights.sum(axis=1)), weights, fade


def finish(state: Softmax) -> tuple[jax.Array, jax.Array]:
    """1 / total, 0 for a row that saw no key, and the natural-log lse, -inf for such a row."""
    some = state.total > 0.0
    inverse = jnp.where(some, 1.0 / jnp.where(some, state.total, 1.0), 0.0)
    return inverse, (state.top + jnp.log2(state.total)) * LN2


def over_columns(x: jax.Array, shape) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])


def row_values(x, rows: int, dtype=jnp.float32) -> jax.Array:
    return plgpu.layout_cast(jnp.full((rows,), x, dtype), ROWS)

"""L1 distances of a tile, and the way back through them, without an array that has both keys and features.

    d_ij = sum_w |x_iw - y_jw|        dx_iw = sum_j dd_ij sign(x_iw - y_jw)        sign(0) = 0

A pass of a loop takes a chunk of the summed axis, written out, so that XLA keeps its sum in registers.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax

# Terms written out in one pass. XLA's CPU backend copies an operand that it reads at 16 places or more and
# fuses one read at fewer, and with a gather inside the loop is 6 times slower; beyond 32, registers spill.
_CHUNK = 16


def distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., I, D] and [..., J, D] -> float32 or wider [..., I, J]."""

    def add(total, chunk):
        terms = (jnp.abs(x[..., :, None] - y[..., None, :]) for x, y in zip(*chunk, strict=True))
        return total + functools.reduce(operator.add, terms), None

    wide = jnp.promote_types(x.dtype, jnp.float32)
    start = jnp.zeros((*x.shape[:-1], y.shape[-2]), wide)
    return lax.scan(add, start, (_chunks(x.astype(wide), -1), _chunks(y.astype(wide), -1)))[0]


def gradient(dd: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """dx [..., I, D] of dd [..., I, J], x [..., I, D], y [..., J, D], in dd's dtype."""
    x = jnp.swapaxes(x, -1, -2).astype(dd.dtype)

    def add(total, chunk):
        terms = (_signed(dd[..., None, :], x - y[..., :, None]) for dd, y in zip(*chunk, strict=True))
        return total + functools.reduce(operator.add, terms), None

    chunks = _chunks(dd, -1), _chunks(y.astype(dd.dtype), -2)
    return jnp.swapaxes(lax.scan(add, jnp.zeros(x.shape, dd.dtype), chunks)[0], -1, -2)


def _signed(value: jax.Array, by: jax.Array) -> jax.Array:
    """value sign(by), exact: 0 for a tie."""
    return jnp.where(by > 0, value, jnp.where(by < 0, -value, 0))


def _chunks(x: jax.Array, axis: int) -> jax.Array:
    """The axis cut in chunks and moved to the front, [chunks, terms, ...], zeros at the end: they add nothing."""
    x = jnp.moveaxis(x, axis, 0)
    count = max(2, x.shape[0] // _CHUNK)  # XLA takes a loop of one pass apart
    terms = max(_CHUNK, -(-x.shape[0] // count))
    x = jnp.pad(x, [(0, count * terms - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(count, terms, *x.shape[1:])

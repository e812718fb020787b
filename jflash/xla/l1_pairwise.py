"""All L1 distances of two sets of points, and their gradient, without an array of pairs and features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jflash.xla.l1_distances import distances, gradient

_BLOCK = 512  # rows at a time


@jax.custom_vjp
def pairwise(x: jax.Array, y: jax.Array) -> jax.Array:
    """x [N, I, D] and y [N, J, D] -> sum_w |x_iw - y_jw|, [N, I, J] in float32 or wider."""

    def of_block(task):
        block, n = task
        return distances(block, y[n])

    blocks, owner = _blocks(x)
    d = lax.map(of_block, (blocks, owner))
    return d.reshape(x.shape[0], -1, y.shape[1])[:, : x.shape[1]]


def _forward(x: jax.Array, y: jax.Array):
    return pairwise(x, y), (x, y)


def _backward(points, dd: jax.Array):
    x, y = points

    def of_block(dy, task):
        block, n, dd = task
        dy = dy.at[n].add(gradient(dd.T, y[n], block))
        return dy, gradient(dd, block, y[n])

    blocks, owner = _blocks(x)
    dy, dx = lax.scan(of_block, jnp.zeros(y.shape, dd.dtype), (blocks, owner, _blocks(dd)[0]))
    dx = dx.reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]
    return dx.astype(x.dtype), dy.astype(y.dtype)


pairwise.defvjp(_forward, _backward)


def _blocks(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[N, I, ...] -> blocks of rows [N blocks, rows, ...], zeros at the end, and the n of each."""
    N, I, _ = x.shape
    rows = min(_BLOCK, I)
    count = -(-I // rows)
    x = jnp.pad(x, ((0, 0), (0, count * rows - I), (0, 0)))
    return x.reshape(N * count, rows, -1), jnp.repeat(jnp.arange(N), count)

"""One tile of L1 scores, with every feature, and the way back from their cotangent to queries and keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jflash.xla.backward import merge
from jflash.xla.l1_distances import distances, gradient
from jflash.xla.operands import Grouped
from jflash.xla.scores import At, positions, sizes, visible
from jflash.xla.tiles import Tile, take
from pallas_kernels.problem import L1Problem


def scores(p: L1Problem, t: Tile, g: Grouped, at: At, q: jax.Array, k: jax.Array, masked: bool):
    """Scores of a query block q [b, h, G, bq, D] and a key block k [b, h, 1, bk, D].

    Returns s [b, h, G, bq, bk], -inf where not visible, and d(s)/d(distance).
    """
    d = distances(merge(q), k[:, :, 0]).reshape(*q.shape[:4], k.shape[3])
    if p.center:
        d = d - (_size(q, d.dtype)[..., :, None] + _size(k, d.dtype)[..., None, :]) / math.sqrt(2)
    if p.kind == "neg":
        s, slope = -p.scale * d, -p.scale
    else:
        s = 1 / (p.eps + p.scale * d)
        slope = -p.scale * s * s
    if g.bias is not None:
        s = s + take(g.bias, at.starts(t), sizes(t)).astype(s.dtype)
    seen = visible(p, t, g, at, masked)
    s = s if seen is None else jnp.where(seen, s, -jnp.inf)
    if p.exclude_diagonal:
        i, j = positions(p, t, g, at)
        s = jnp.where(i == j, -jnp.inf, s)
    return s, slope


def gradients(p: L1Problem, dd: jax.Array, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dq [b, h, G, bq, D] and dk [b, h, 1, bk, D] from the distances' cotangent [b, h, G, bq, bk]."""
    dd, rows, columns = merge(dd), merge(q), k[:, :, 0]
    dq = gradient(dd, rows, columns)
    dk = gradient(jnp.swapaxes(dd, -1, -2), columns, rows)
    if p.center:
        dq = dq - dd.sum(-1)[..., None] * jnp.sign(rows).astype(dd.dtype) / math.sqrt(2)
        dk = dk - dd.sum(-2)[..., None] * jnp.sign(columns).astype(dd.dtype) / math.sqrt(2)
    return dq.reshape(q.shape), dk[:, :, None]


def _size(x: jax.Array, dtype) -> jax.Array:
    return jnp.abs(x.astype(dtype)).sum(axis=-1)

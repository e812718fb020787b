"""Masked linear attention in tiles: out_i = scale sum_j (q_i . k_j) M_ij v_j with any mask, and its gradient.

    A = scale q k^T    dA = (dO v^T) M    dq = scale dA k    dk = scale dA^T q    dv = (A M)^T dO    dM = A (dO v^T)

Nothing of Sq x Sk is stored but M and dM, in M's own shape: where M broadcasts, dM is summed tile by tile.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jflash.xla.linear_heads import gradient_of, heads_first, product
from jflash.xla.tiles import add, largest_divisor, put, take
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem

# Weights in flight: few stay in a CPU's cache, a GPU wants large products.
_IN_FLIGHT = {"cpu": 2**18}
_IN_FLIGHT_ELSEWHERE = 2**26
BLOCK = 512  # queries and keys of a tile


class Tile(NamedTuple):
    """b batches, h heads, bq queries and bk keys at a time; nq and nk blocks of rows and columns.

    The last block reaches back into the one before it, so that nothing is padded: M would be copied.
    """

    b: int
    h: int
    bq: int
    bk: int
    nq: int
    nk: int


class Operands(NamedTuple):
    """Heads spread and first: [B, H, S, D], and the mask [B|1, H|1, Sq|1, Sk|1]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    mask: jax.Array


def forward(p: LinearProblem, a: LinearArrays, dtype: jnp.dtype) -> jax.Array:
    """out [B, Sq, H, Dv] in a dtype."""
    t, o = _tile(p), _operands(p, a)

    def block(out, task):
        b, h, qi = task
        start, size = (b, h, _start(qi, t.bq, p.Sq), 0), (t.b, t.h, t.bq, None)
        q = take(o.q, start, size)

        def step(ki, total):
            k, v, mask, _ = _keys(p, t, o, task, ki)
            weights = product("bhid,bhjd->bhij", q, k) * mask
            return total + product("bhij,bhjv->bhiv", weights.astype(v.dtype), v)

        total = jnp.zeros((t.b, t.h, t.bq, p.Dv), jnp.promote_types(q.dtype, jnp.float32))
        total = lax.fori_loop(0, t.nk, step, total) * p.scale
        return put(out, total.astype(dtype), start), None

    out, _ = lax.scan(block, jnp.zeros((p.B, p.H, p.Sq, p.Dv), dtype), _tasks(p, t))
    return jnp.moveaxis(out, 1, 2)


def backward(p: LinearProblem, a: LinearArrays, d_out: jax.Array) -> LinearGradients:
    """Gradients of q, k, v and, if wanted, the mask."""
    t, o = _tile(p), _operands(p, a)
    wide = jnp.promote_types(o.q.dtype, jnp.float32)
    grads = Operands(*(jnp.zeros(x.shape, wide) for x in o))
    if not p.mask_gradient:
        grads = grads._replace(mask=None)
    d_out = heads_first(d_out, p.H)
    (dq, dk, dv, d_mask), _ = lax.scan(functools.partial(_backward_block, p, t, o, d_out), grads, _tasks(p, t))
    return LinearGradients(
        q=gradient_of(a.q, dq),
        k=gradient_of(a.k, dk),
        v=gradient_of(a.v, dv),
        mask=d_mask.astype(a.mask.dtype) if p.mask_gradient else None,
    )


def _backward_block(p: LinearProblem, t: Tile, o: Operands, d_out: jax.Array, grads: Operands, task):
    """Adds what a block of queries gives to every gradient."""
    b, h, qi = task
    start, rows = (b, h, _start(qi, t.bq, p.Sq), 0), (t.b, t.h, t.bq, None)
    q = take(o.q, start, rows)
    d_out = _from(qi * t.bq, start[2], take(d_out, start, rows))

    def step(ki, grads):
        k, v, mask, keys = _keys(p, t, o, task, ki)
        columns = (t.b, t.h, t.bk, None)
        pairs, d_weights = product("bhid,bhjd->bhij", q, k), product("bhiv,bhjv->bhij", d_out, v)
        weights, d_pairs = (pairs * mask).astype(q.dtype), (d_weights * mask).astype(q.dtype)
        dq, dk = product("bhij,bhjd->bhid", d_pairs, k), product("bhij,bhid->bhjd", d_pairs, q)
        grads = grads._replace(
            q=add(grads.q, dq * p.scale, start, rows),
            k=add(grads.k, dk * p.scale, keys, columns),
            v=add(grads.v, product("bhij,bhiv->bhjv", weights, d_out) * p.scale, keys, columns),
        )
        if grads.mask is None:
            return grads
        corner = (b, h, start[2], keys[2])
        return grads._replace(mask=add(grads.mask, pairs * d_weights * p.scale, corner, (t.b, t.h, t.bq, t.bk)))

    return lax.fori_loop(0, t.nk, step, grads), None


def _keys(p: LinearProblem, t: Tile, o: Operands, task, ki):
    """k, v and the mask of a tile, and where its keys start; keys of an earlier block are 0."""
    b, h, qi = task
    start, size = (b, h, _start(ki, t.bk, p.Sk), 0), (t.b, t.h, t.bk, None)
    k, v = (_from(ki * t.bk, start[2], take(x, start, size)) for x in (o.k, o.v))
    mask = take(o.mask, (b, h, _start(qi, t.bq, p.Sq), start[2]), (t.b, t.h, t.bq, t.bk))
    return k, v, mask.astype(jnp.promote_types(k.dtype, jnp.float32)), start


def _start(block: jax.Array, size: int, length: int) -> jax.Array:
    return jnp.minimum(block * size, length - size)


def _from(position: jax.Array, start: jax.Array, x: jax.Array) -> jax.Array:
    """x [b, h, rows, D], whose rows begin at `start`, with 0 in the rows before `position`."""
    row = start + lax.broadcasted_iota(jnp.int32, (x.shape[2], 1), 0)
    return jnp.where(row >= position, x, 0)


def _tile(p: LinearProblem) -> Tile:
    nq, nk = math.ceil(p.Sq / BLOCK), math.ceil(p.Sk / BLOCK)
    bq, bk = math.ceil(p.Sq / nq), math.ceil(p.Sk / nk)
    heads = max(1, _IN_FLIGHT.get(p.target, _IN_FLIGHT_ELSEWHERE) // (bq * bk))
    h = largest_divisor(p.H, heads)
    b = largest_divisor(p.B, heads // h) if h == p.H else 1
    return Tile(b, h, bq, bk, nq, nk)


def _tasks(p: LinearProblem, t: Tile) -> list[jax.Array]:
    """The first batch, the first head and the query block of every task."""
    starts = (jnp.arange(0, n, step, dtype=jnp.int32) for n, step in ((p.B, t.b), (p.H, t.h), (t.nq, 1)))
    return [x.ravel() for x in jnp.meshgrid(*starts, indexing="ij")]


def _operands(p: LinearProblem, a: LinearArrays) -> Operands:
    assert a.mask is not None
    return Operands(heads_first(a.q, p.H), heads_first(a.k, p.H), heads_first(a.v, p.H), a.mask)

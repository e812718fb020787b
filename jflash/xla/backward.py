"""Blocked backward: probabilities are recomputed from lse tile by tile, never stored.

    P = exp(S - lse)    dV = P^T dO    dP = dO V^T    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q
    delta_i = sum_d dO_id O_id - dlse_i

(Dao, arXiv 2307.08691, with the cotangent of lse folded into delta.)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jflash.xla import operands, tiles
from jflash.xla.operands import Grouped
from jflash.xla.scores import At, kept, key_blocks, product, scores, sizes
from jflash.xla.tiles import Tile, add, take
from pallas_kernels.problem import AttentionArrays, AttentionGradients, AttentionProblem


def backward(p: AttentionProblem, a: AttentionArrays, out, lse, d_out, d_lse) -> AttentionGradients:
    """Gradients of every differentiable operand, given both outputs and their cotangents."""
    return backward_blocks(p, a, out, lse, d_out, d_lse, _step)


def backward_blocks(p: AttentionProblem, a: AttentionArrays, out, lse, d_out, d_lse, step) -> AttentionGradients:
    """The gradients, where step(p, t, g, block, at, ki, carry, masked) adds a tile to (dq, dk, dv, d_bias)."""
    t = tiles.choose(p, block_q=512, block_k=256)
    g, d_out = operands.group(p, t, a), operands.cleared(a, 0, d_out)
    blind = lse == -jnp.inf  # such a row has no gradient: its exp(s - inf) is 0
    delta = product("bihv,bihv->bhi", d_out, out).astype(lse.dtype) - jnp.where(blind, 0, d_lse)
    lse = jnp.where(blind, jnp.inf, lse)
    rows = (
        operands.rows(p, t, d_out),
        operands.statistic(p, t, lse, jnp.inf),
        operands.statistic(p, t, delta, 0.0),
    )
    d_bias = None if not p.bias_gradient else jnp.zeros(g.bias.shape, lse.dtype)
    starts = (jnp.arange(0, n, size, dtype=jnp.int32) for n, size in ((p.B, t.b), (p.Hk, t.h)))
    corners = jnp.meshgrid(*starts, indexing="ij")
    chunk = functools.partial(_chunk, p, t, g, rows, step)
    d_bias, (dq, dk, dv) = lax.scan(chunk, d_bias, [x.ravel() for x in corners])
    dq = jnp.moveaxis(dq, 1, 4).reshape(-1, t.b, t.h, p.group, t.nq * t.bq, p.D)
    return AttentionGradients(
        q=_join(p, t, dq, p.Sq).astype(a.q.dtype),
        k=_join(p, t, dk, p.Sk).astype(a.k.dtype),
        v=_join(p, t, dv, p.Sk).astype(a.v.dtype),
        bias=None if d_bias is None else _cut(p, d_bias).astype(a.bias.dtype),
        sinks=None if a.sinks is None else _sink_gradient(a.sinks, lse, delta),
    )


def _chunk(p: AttentionProblem, t: Tile, g: Grouped, rows, step, d_bias, corner):
    """All query blocks of one chunk of heads: dk and dv stay in the carry, dq comes out block by block."""
    b, h = corner
    wide = rows[1].dtype
    head = (t.b, t.h, 1, t.nk * t.bk)
    carry = (jnp.zeros((*head, p.D), wide), jnp.zeros((*head, p.Dv), wide), d_bias)
    query_block = functools.partial(_query_block, p, t, g, rows, step, b, h)
    (dk, dv, d_bias), dq = lax.scan(query_block, carry, jnp.arange(t.nq, dtype=jnp.int32))
    return d_bias, (dq, dk, dv)


def _query_block(p: AttentionProblem, t: Tile, g: Grouped, rows, step, b, h, carry, qi):
    d_out, lse, delta = rows
    corner, size = (b, h, 0, qi * t.bq), (t.b, t.h, None, t.bq)
    block = (
        take(g.q, (*corner, 0), (*size, None)),
        take(d_out, (*corner, 0), (*size, None)),
        take(lse, corner, size)[..., None],
        take(delta, corner, size)[..., None],
    )
    dq = jnp.zeros(block[0].shape, lse.dtype)
    at = At(b, h, qi, jnp.int32(0))
    step = functools.partial(step, p, t, g, block, at)
    dq, *carry = tiles.over_keys(p, t, qi, key_blocks(p, t, g, at), step, (dq, *carry))
    return tuple(carry), dq


def _step(p: AttentionProblem, t: Tile, g: Grouped, block, at: At, ki, carry, masked: bool):
    """Takes one key block: adds to the query block's dq and to the keys' dk, dv."""
    q, d_out, lse, delta = block
    dq, dk, dv, d_bias = carry
    at = at._replace(ki=ki)
    size = (t.b, t.h, None, t.bk, None)
    corner = (at.b, at.h, 0, ki * t.bk, 0)
    k, v = take(g.k, corner, size), take(g.v, corner, size)
    s, slope = scores(p, t, g, at, q, k, masked)
    weights = jnp.exp(s - lse)
    d_weights = product("nhgqv,nhkv->nhgqk", d_out, v[:, :, 0])
    dropped = weights
    if p.dropout_rate:
        keep = kept(p, t, g, at)
        dropped, d_weights = (jnp.where(keep, x / (1 - p.dropout_rate), 0) for x in (weights, d_weights))
    ds = weights * (d_weights - delta)
    if d_bias is not None:
        d_bias = add(d_bias, ds, at.starts(t), sizes(t))
    ds = (ds if slope is None else ds * slope).astype(q.dtype)
    dq = dq + product("nhgqk,nhkd->nhgqd", ds, k[:, :, 0]) * p.scale
    here, size = (0, 0, 0, ki * t.bk, 0), (None, None, None, t.bk, None)
    dk = add(dk, product("nhrk,nhrd->nhkd", merge(ds), merge(q))[:, :, None] * p.scale, here, size)
    dv = add(dv, product("nhrk,nhrv->nhkv", merge(dropped.astype(q.dtype)), merge(d_out))[:, :, None], here, size)
    return dq, dk, dv, d_bias


def _sink_gradient(sinks: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    """A sink is one more column of weight exp(sink - lse) and value 0, so its dS is -weight delta."""
    weight = jnp.exp(sinks[:, :, None].astype(lse.dtype) - lse)
    d_sinks = -(weight * delta).sum(axis=-1)
    if sinks.shape[0] == 1:
        d_sinks = d_sinks.sum(axis=0, keepdims=True)
    return d_sinks.astype(sinks.dtype)


def _join(p: AttentionProblem, t: Tile, x: jax.Array, length: int) -> jax.Array:
    """Chunks [chunks, b, h, G, S, D] -> [B, S, H, D], padding cut off."""
    x = x.reshape(p.B // t.b, p.Hk // t.h, *x.shape[1:])
    x = jnp.moveaxis(x, 2, 1)[..., :length, :]
    return jnp.moveaxis(x.reshape(p.B, -1, length, x.shape[-1]), 2, 1)


def _cut(p: AttentionProblem, d_bias: jax.Array) -> jax.Array:
    """[B|1, Hk|1, G|1, Sq|1, Sk|1] with padding -> the bias's own shape."""
    assert p.bias_shape is not None
    b, h, i, j = p.bias_shape
    return d_bias.reshape(b, h, *d_bias.shape[3:])[:, :, :i, :j]


def merge(x: jax.Array) -> jax.Array:
    """[b, h, G, rows, columns] -> [b, h, G rows, columns]: XLA contracts one axis faster than two."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])

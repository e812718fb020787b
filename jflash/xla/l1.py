"""Blocked L1 attention for any device: the tiles and loops of softmax attention, around scores from distances.

W = softmax(S)  or  exp(S)  or  1 + tanh(S)        out = W V        dV = W^T dO        dP = dO V^T
dS = W (dP - delta)  or  W dP  or  W (2 - W) dP    delta_i = sum_d dO_id O_id - dlse_i
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jflash.l1_reference import weight
from jflash.xla.backward import backward_blocks, merge
from jflash.xla.forward import accumulate, forward_blocks
from jflash.xla.l1_scores import gradients, scores
from jflash.xla.operands import Grouped
from jflash.xla.scores import At, product, sizes, visible
from jflash.xla.tiles import Tile, add, take
from pallas_kernels.problem import AttentionArrays, AttentionGradients, L1Problem


def forward(p: L1Problem, a: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] in the input dtype and lse [B, H, Sq] in float32 or wider, 0 but for softmax."""
    out, lse = forward_blocks(p, a, _forward_step)
    return out, lse if p.weight == "softmax" else jnp.zeros_like(lse)


def backward(p: L1Problem, a: AttentionArrays, out, lse, d_out, d_lse) -> AttentionGradients:
    """Gradients of every differentiable operand, given both outputs and their cotangents."""
    return backward_blocks(p, a, out, lse, d_out, d_lse, _backward_step)


def _forward_step(p: L1Problem, t: Tile, g: Grouped, q: jax.Array, at: At, ki, carry, masked: bool):
    """Takes one key block into the running (acc, top, total)."""
    at = at._replace(ki=ki)
    return _unless_hidden(p, t, g, at, masked, functools.partial(_take, p, t, g, q, at, masked), carry)


def _take(p: L1Problem, t: Tile, g: Grouped, q: jax.Array, at: At, masked: bool, carry):
    k, v = (_keys(t, at, x) for x in (g.k, g.v))
    s, _ = scores(p, t, g, at, q, k, masked)
    if p.weight == "softmax":
        return accumulate(p, t, g, at, s, carry)
    acc, top, total = carry
    acc = acc + product("nhgqk,nhkv->nhgqv", weight(p, s).astype(v.dtype), v[:, :, 0])
    return acc, top, jnp.ones_like(total)


def _backward_step(p: L1Problem, t: Tile, g: Grouped, block, at: At, ki, carry, masked: bool):
    """Takes one key block: adds to the query block's dq and to the keys' dk, dv."""
    at = at._replace(ki=ki)
    return _unless_hidden(p, t, g, at, masked, functools.partial(_add, p, t, g, block, at, masked), carry)


def _add(p: L1Problem, t: Tile, g: Grouped, block, at: At, masked: bool, carry):
    q, d_out, lse, delta = block
    dq, dk, dv, d_bias = carry
    k, v = (_keys(t, at, x) for x in (g.k, g.v))
    s, slope = scores(p, t, g, at, q, k, masked)
    d_weights = product("nhgqv,nhkv->nhgqk", d_out, v[:, :, 0])
    if p.weight == "softmax":
        weights = jnp.exp(s - lse)
        ds = weights * (d_weights - delta)
    else:
        weights = weight(p, s)
        ds = weights * d_weights * (1 if p.weight == "exp" else 2 - weights)
    if d_bias is not None:
        d_bias = add(d_bias, ds, at.starts(t), sizes(t))
    dq_tile, dk_tile = gradients(p, ds * slope, q, k)
    dv_tile = product("nhrk,nhrv->nhkv", merge(weights.astype(q.dtype)), merge(d_out))[:, :, None]
    here, size = (0, 0, 0, at.ki * t.bk, 0), (None, None, None, t.bk, None)
    return dq + dq_tile, add(dk, dk_tile, here, size), add(dv, dv_tile, here, size), d_bias


def _unless_hidden(p: L1Problem, t: Tile, g: Grouped, at: At, masked: bool, step, carry):
    """step(carry), left out where segments hide a whole tile: looking is cheap beside distances."""
    if not p.segments:
        return step(carry)
    seen = visible(p, t, g, at, masked)
    assert seen is not None
    return lax.cond(seen.any(), step, lambda carry: carry, carry)


def _keys(t: Tile, at: At, x: jax.Array) -> jax.Array:
    """The key block of a tile from x [B, Hk, 1, Sk, D]."""
    return take(x, (at.b, at.h, 0, at.ki * t.bk, 0), (t.b, t.h, None, t.bk, None))

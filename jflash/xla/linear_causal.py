"""Chunked linear attention, O(N) in time and memory: matrix products inside a chunk, a state between chunks.

    out = scale (A v + enter q S)    S' = total S + (leave k)^T v    A = within (q k^T)

S is the state that enters a chunk and S' the one that leaves it; see `linear_decay` for the factors. The
gradient dS of a state follows the same recurrence against time, so that one scan serves both:

    dS = total dS' + scale (enter q)^T dO
    dq = scale (dA k + enter dO S^T)    dk = scale dA^T q + leave v dS'^T    dv = scale A^T dO + leave k dS'
    dA = within (dO v^T)

and the logs of the factors have the gradients A (dO v^T), q . dq, k . dk (the parts through a state) and
<total S, dS'>. Source: Qin et al., Lightning Attention-2 (arXiv 2401.04658); Yang et al., Gated Linear
Attention (arXiv 2312.06635).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jflash.xla import linear_chunks, linear_decay
from jflash.xla.linear_chunks import Cut, Packing
from jflash.xla.linear_decay import Decay
from jflash.xla.linear_heads import gather, product, spread, working_dtype
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem


class Chunks(NamedTuple):
    """Operands [n, B, Hx, C, ...], or those of one chunk without the first axis."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array | None  # [n, B|1, H, C] log decay


@dataclasses.dataclass(frozen=True)
class Pass:
    """One direction of time: tokens see earlier ones, or later ones if reverse, and with diagonal themselves."""

    p: LinearProblem
    cut: Cut
    reverse: bool
    diagonal: bool
    dtype: jnp.dtype  # of what is stored for each token

    def decay(self, g: jax.Array | None) -> Decay:
        wide = jnp.promote_types(self.p.dtype, jnp.float32)
        return linear_decay.decay_of(g, self.cut.size, wide, self.reverse, self.diagonal)


def forward(p: LinearProblem, a: LinearArrays, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """out [B, S, H, Dv] in a dtype, and the final state [states, H, D, Dv] if the call is causal."""
    cut = linear_chunks.choose(p)
    packing = linear_chunks.pack(p, cut, a.cu_seqlens)
    chunks = _chunks(p, cut, packing, a)
    found, final = [], None
    for way in _passes(p, cut, dtype):
        entering, final = _states(way, packing, chunks.k, chunks.v, chunks.g, a.kv, adjoint=False)
        found.append(lax.map(functools.partial(_out, way), (chunks, entering), batch_size=cut.together))
    out = linear_chunks.join(cut, packing, sum(found), p.Sq).astype(dtype)
    return out, final if p.causal else None


def backward(p: LinearProblem, a: LinearArrays, d_out: jax.Array, d_kv: jax.Array | None) -> LinearGradients:
    """Gradients of q, k, v, log_decay and kv, given the cotangents of out and of the final state."""
    cut = linear_chunks.choose(p)
    packing = linear_chunks.pack(p, cut, a.cu_seqlens)
    chunks = _chunks(p, cut, packing, a)
    d_out = linear_chunks.split(cut, packing, d_out.astype(chunks.v.dtype))
    found, d_initial = [], None
    for way in _passes(p, cut, a.q.dtype):
        entering, _ = _states(way, packing, chunks.k, chunks.v, chunks.g, a.kv, adjoint=False)
        d_leaving, d_initial = _states(way, packing, chunks.q, d_out, chunks.g, d_kv, adjoint=True)
        task = (chunks, d_out, entering, d_leaving)
        found.append(lax.map(functools.partial(_gradients, way), task, batch_size=cut.together))
    total = jax.tree.map(lambda *parts: linear_chunks.join(cut, packing, sum(parts), p.Sq), *found)
    dq, dk, dv, dg = total
    return LinearGradients(
        q=dq.astype(a.q.dtype),
        k=dk.astype(a.k.dtype),
        v=dv.astype(a.v.dtype),
        log_decay=None if dg is None else _summed_to(a.log_decay, dg),
        kv=d_initial if p.initial_state else None,
    )


def _chunks(p: LinearProblem, cut: Cut, packing: Packing | None, a: LinearArrays) -> Chunks:
    q, k, v = (linear_chunks.split(cut, packing, x.astype(working_dtype(x.dtype))) for x in (a.q, a.k, a.v))
    if a.log_decay is None:
        return Chunks(q, k, v, None)
    g = a.log_decay.astype(jnp.promote_types(p.dtype, jnp.float32))
    g = jnp.broadcast_to(g, (g.shape[0], p.Sq, p.H))
    return Chunks(q, k, v, linear_chunks.split(cut, packing, g))


def _passes(p: LinearProblem, cut: Cut, dtype: jnp.dtype) -> list[Pass]:
    """The directions of a call. Of two, the second leaves out the diagonal, and their sum wants a wide dtype."""
    if p.causal:
        return [Pass(p, cut, reverse=p.after, diagonal=True, dtype=dtype)]
    wide = jnp.promote_types(dtype, jnp.float32)
    return [Pass(p, cut, reverse, diagonal=not reverse, dtype=wide) for reverse in (False, True)]


def _states(way: Pass, packing: Packing | None, left, right, g, initial, *, adjoint: bool):
    """The state that enters each chunk, [n, B, H, D, Dv], and the final one, [states, H, D, Dv].

    A state sums the products of left and right, [n, B, Hx, C, ...]. `adjoint` runs against time: what enters
    a chunk is then the cotangent of the state that leaves it.
    """
    p, backwards = way.p, way.reverse != adjoint
    shape = (p.H, left.shape[-1], right.shape[-1])
    if initial is None:
        initial = jnp.zeros((p.states, *shape), jnp.promote_types(left.dtype, jnp.float32))
    here = None if packing is None else (packing.sequence, packing.last if backwards else packing.first)

    def step(carry, chunk):
        state, final = carry
        left, right, g, here = chunk
        if here is not None:
            sequence, first = here
            state = jnp.where(first, initial.at[sequence].get(mode="fill", fill_value=0), state)
        decay = way.decay(g)
        factor = p.scale * decay.enter if adjoint else decay.leave
        left, right = (spread(left, p.H) * factor).astype(right.dtype), spread(right, p.H)
        new = decay.total * state + product("bhcd,bhcv->bhdv", left, right)
        if here is not None:
            final = final.at[sequence].set(new[0], mode="drop")
        return (new, final), state

    start = (initial, None) if packing is None else (jnp.zeros((1, *shape), initial.dtype), initial)
    (state, final), entering = lax.scan(step, start, (left, right, g, here), reverse=backwards)
    return entering, state if packing is None else final


def _out(way: Pass, task) -> jax.Array:
    """[B, H, C, Dv] of one chunk."""
    (q, k, v, g), state = task
    decay, heads = way.decay(g), way.p.H
    weights = spread(_pairs(q, k), heads) * decay.within
    inside = product("bhij,bhjv->bhiv", weights.astype(v.dtype), spread(v, heads))
    outside = product("bhid,bhdv->bhiv", spread(q, heads), state.astype(q.dtype))
    return (way.p.scale * (inside + decay.enter * outside)).astype(way.dtype)


def _gradients(way: Pass, task):
    """dq, dk, dv [B, Hx, C, ...] and dg [B, H, C] of one chunk, from the state before it and dS' behind it."""
    (q, k, v, g), d_out, state, d_state = task
    p, decay = way.p, way.decay(g)
    heads, shared = p.H, math.lcm(p.Hq, p.Hk)
    pairs = spread(_pairs(q, k), heads)
    d_pairs = product("bhiv,bhjv->bhij", d_out, spread(v, heads)) * decay.within
    near = gather(d_pairs, shared).astype(q.dtype)
    dq = product("bhij,bhjd->bhid", near, spread(k, shared)) * p.scale
    dk = product("bhij,bhid->bhjd", near, spread(q, shared)) * p.scale
    weights = (pairs * decay.within).astype(v.dtype)
    far_q = decay.enter * product("bhiv,bhdv->bhid", d_out, state.astype(v.dtype)) * p.scale
    far_k = decay.leave * product("bhjv,bhdv->bhjd", spread(v, heads), d_state.astype(v.dtype))
    far_v = decay.leave * product("bhjd,bhdv->bhjv", spread(k, heads), d_state.astype(v.dtype))
    dv = far_v + product("bhij,bhiv->bhjv", weights, d_out) * p.scale
    dg = None
    if p.decay_gradient:
        through = Decay(
            within=pairs * d_pairs * p.scale,
            enter=(spread(q, heads) * far_q).sum(axis=-1, keepdims=True),
            leave=(spread(k, heads) * far_k).sum(axis=-1, keepdims=True),
            total=(decay.total * state * d_state).sum(axis=(-2, -1), keepdims=True),
        )
        dg = linear_decay.gradient(through, way.reverse)
    dq, dk = gather(dq, p.Hq) + gather(far_q, p.Hq), gather(dk, p.Hk) + gather(far_k, p.Hk)
    return dq.astype(way.dtype), dk.astype(way.dtype), gather(dv, p.Hv).astype(way.dtype), dg


def _pairs(q: jax.Array, k: jax.Array) -> jax.Array:
    """q k^T [B, heads, C, C] of as many heads as differ."""
    heads = math.lcm(q.shape[1], k.shape[1])
    return product("bhid,bhjd->bhij", spread(q, heads), spread(k, heads))


def _summed_to(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """gradient summed over the axes on which x broadcasts, in x's dtype."""
    axes = tuple(axis for axis, (n, m) in enumerate(zip(x.shape, gradient.shape, strict=True)) if n != m)
    return gradient.sum(axis=axes, keepdims=True).astype(x.dtype)

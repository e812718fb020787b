"""L1 attention over listed pairs: gathers and segment sums, a chunk of pairs at a time, gradients by autodiff.

    P_e = exp(s_e) / (exp(sink) + sum of exp(s_f) over the pairs f with dst_f = dst_e),  s_e = s(q[dst_e], k[src_e])
    out[t] = sum of P_e v[src_e] over the pairs to t        and, both ways, + P_e vb[dst_e] over the pairs from t

Memory grows with pairs x heads: only a chunk is spread over features, and it is computed again in the backward.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jflash._transforms import by_standard_rules
from jflash.l1_reference import scores, weight
from pallas_kernels.problem import AttentionArrays, L1Problem

_SPREAD = 2**21  # numbers of a chunk that is spread over features


@functools.partial(jax.jit, static_argnums=0)
@by_standard_rules
def attend(p: L1Problem, a: AttentionArrays, vb: jax.Array | None, dst: jax.Array, src: jax.Array) -> jax.Array:
    """out [B, Sq, H, Dv] in q's dtype for pairs dst, src [E]; a pair out of range adds nothing."""
    if p.empty:
        return jnp.zeros((p.B, p.Sq, p.H, p.Dv), a.q.dtype)
    q, (k, v) = a.q, (jnp.repeat(x, p.group, axis=2) for x in (a.k, a.v))
    vb = None if vb is None else jnp.repeat(vb, p.group, axis=2)
    valid = (dst >= 0) & (dst < p.Sq) & (src >= 0) & (src < p.Sk)
    dst, src = jnp.where(valid, dst, p.Sq), jnp.where(valid, src, p.Sk)  # indices that scatters drop
    chunk = max(1, min(dst.size, _SPREAD // max(1, p.B * p.H * max(p.D, p.Dv))))
    dst, src = _chunks(dst, chunk, p.Sq), _chunks(src, chunk, p.Sk)
    s = lax.map(jax.checkpoint(lambda pairs: scores(p, _at(q, pairs[0]), _at(k, pairs[1]))), (dst, src))
    s = jnp.where((dst < p.Sq)[:, None, :, None], s, -jnp.inf)
    weights = _softmax(p, s, dst, a.sinks) if p.weight == "softmax" else weight(p, s)

    def add(out, pairs):
        weights, dst, src = pairs
        out = out.at[:, dst].add(_weighted(weights, v, src), mode="drop")
        if vb is not None:
            out = out.at[:, src].add(_weighted(weights, vb, dst), mode="drop")
        return out, None

    out, _ = lax.scan(add, jnp.zeros((p.B, p.Sq, p.H, p.Dv), s.dtype), (weights, dst, src))
    return out.astype(q.dtype)


def _softmax(p: L1Problem, s: jax.Array, dst: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Weights from scores [chunks, B, chunk, H], normalized over the pairs with one dst."""
    shape = s.shape
    s, dst = jnp.moveaxis(s, 1, 0).reshape(p.B, -1, p.H), dst.ravel()
    top = jnp.full((p.B, p.Sq, p.H), -jnp.inf, s.dtype).at[:, dst].max(lax.stop_gradient(s), mode="drop")
    if sinks is not None:
        top = jnp.maximum(top, lax.stop_gradient(sinks).astype(s.dtype)[:, None])
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(s - _at(top, dst))
    total = jnp.zeros(top.shape, s.dtype).at[:, dst].add(weights, mode="drop")
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(s.dtype)[:, None] - top)
    weights = weights / _at(jnp.where(total > 0, total, 1), dst, otherwise=1)
    return jnp.moveaxis(weights.reshape(p.B, shape[0], shape[2], p.H), 0, 1)


@jax.checkpoint
def _weighted(weights: jax.Array, x: jax.Array, rows: jax.Array) -> jax.Array:
    return weights[..., None] * _at(x, rows).astype(weights.dtype)


def _at(x: jax.Array, rows: jax.Array, otherwise: float = 0) -> jax.Array:
    """x [B, S, ...] at some rows; those out of range, which weigh nothing, read nothing."""
    return x.at[:, rows].get(mode="fill", fill_value=otherwise)


def _chunks(index: jax.Array, chunk: int, outside: int) -> jax.Array:
    count = -(-index.size // chunk)
    return jnp.pad(index, (0, count * chunk - index.size), constant_values=outside).reshape(count, chunk)

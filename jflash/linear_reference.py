"""The oracle: linear attention written as its definition, O(Sq Sk) memory, gradients by autodiff.

    w_ij = scale (q_i . k_j) M_ij        M: the mask, or the decay from j to i within one sequence
    out_i = sum_j w_ij v_j + scale enter_i q_i kv           normalized: over sum_j w_ij + scale enter_i q_i . z
    kv' = total kv + sum_j leave_j k_j v_j^T                enter, leave: the decay to i from outside, from j to outside

It defines what every backend must compute. Give it float64 for the truth; given 16-bit inputs it keeps sums
in float32 and rounds what enters a matrix product, as any kernel must.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jflash.reference import round_cotangent
from pallas_kernels.problem import LinearArrays, LinearProblem, LinearResults


def linear_attention(p: LinearProblem, a: LinearArrays) -> LinearResults:
    """out in the input dtype; norm and the state in float32 or wider."""
    wide = jnp.promote_types(a.q.dtype, jnp.float32)
    q, k, v = (_heads(p, x) for x in a[:3])
    member = _membership(p, a)
    if p.sequences is not None:
        q, k, v = (jnp.where(member.any(axis=0)[:, None, None], x, 0) for x in (q, k, v))
    weights = jnp.einsum("bihd,bjhd->bhij", q, k, preferred_element_type=wide)
    weights = round_cotangent(weights, a.q.dtype) * p.scale
    if a.mask is not None:
        weights = weights * a.mask.astype(wide)
    else:
        weights = weights * _decays(p, member, _log_decay(p, a, member, wide))
    out = jnp.einsum("bhij,bjhv->bihv", weights.astype(v.dtype), v, preferred_element_type=wide)
    norm = jnp.moveaxis(weights.sum(axis=-1), 1, 2) if p.normalize else None
    kv = z = None
    if p.causal:
        more, more_norm, kv, z = _state(p, a, member, _log_decay(p, a, member, wide), q, k, v)
        out, norm = out + more, None if norm is None else norm + more_norm
    if norm is not None:
        some = norm != 0
        out = jnp.where(some[..., None], out / jnp.where(some, norm, 1)[..., None], 0)
    return LinearResults(out.astype(a.q.dtype), norm, kv, z)


def _membership(p: LinearProblem, a: LinearArrays) -> jax.Array:
    """Which tokens belong to which sequence of a row, bool [sequences of a row, Sq]."""
    if a.cu_seqlens is None:
        return jnp.ones((1, p.Sq), bool)
    t = jnp.arange(p.Sq)
    return (t >= a.cu_seqlens[:-1, None]) & (t < a.cu_seqlens[1:, None])


def _heads(p: LinearProblem, x: jax.Array) -> jax.Array:
    """[B, S, Hx, D] -> [B, S, H, D]: output head h reads head h // (H / Hx)."""
    return jnp.repeat(x, p.H // x.shape[2], axis=2)


def _log_decay(p: LinearProblem, a: LinearArrays, member: jax.Array, wide) -> jax.Array:
    """[B|1, H, Sq], 0 outside of the sequences."""
    if a.log_decay is None:
        return jnp.zeros((1, p.H, p.Sq), wide)
    g = jnp.moveaxis(a.log_decay.astype(wide), 1, 2)
    return jnp.where(member.any(axis=0), g, 0)


def _decays(p: LinearProblem, member: jax.Array, g: jax.Array) -> jax.Array:
    """M [B|1, H, Sq, Sk]."""
    if p.Sq != p.Sk:
        return jnp.ones((1, 1, p.Sq, p.Sk), g.dtype)
    i, j = jnp.arange(p.Sq)[:, None], jnp.arange(p.Sk)[None, :]
    together = (member[:, :, None] & member[:, None, :]).any(axis=0)
    found = jnp.where(i == j, jnp.ones((), g.dtype), 0)
    if p.before:
        after_j = jnp.where(i > j, g[..., :, None], 0)  # at [s, j]: g_s where s is after j
        found = jnp.where(i > j, jnp.exp(jnp.cumsum(after_j, axis=-2)), found)
    if p.after:
        before_j = jnp.where(i < j, g[..., :, None], 0)
        sums = jnp.flip(jnp.cumsum(jnp.flip(before_j, axis=-2), axis=-2), axis=-2)
        found = jnp.where(i < j, jnp.exp(sums), found)
    return jnp.where(together, found, 0)


def _state(p: LinearProblem, a: LinearArrays, member: jax.Array, g: jax.Array, q, k, v):
    """What the initial state adds to out and norm, and the final state (kv, z)."""
    shape = (p.B, member.shape[0], p.H, p.D)  # [rows, sequences of a row, ...]
    kv = jnp.zeros((*shape, p.Dv), g.dtype) if a.kv is None else a.kv.reshape(*shape, p.Dv)
    z = jnp.zeros(shape, g.dtype) if a.z is None else a.z.reshape(shape)
    enter, leave, total = _spans(p, member, g)
    q = q.astype(g.dtype)
    out = jnp.einsum("bihd,bnhdv,bhni->bihv", q, kv, enter) * p.scale
    norm = jnp.einsum("bihd,bnhd,bhni->bih", q, z, enter) * p.scale
    left = jnp.einsum("bjhd,bhnj->bnjhd", k.astype(g.dtype), leave).astype(k.dtype)
    kv = total[..., None] * kv + jnp.einsum("bnjhd,bjhv->bnhdv", left, v, preferred_element_type=g.dtype)
    z = total * z + left.sum(axis=2, dtype=g.dtype)
    kv, z = kv.reshape(p.states, *kv.shape[2:]), z.reshape(p.states, *z.shape[2:])
    return out, norm, kv, z if p.normalize else None


def _spans(p: LinearProblem, member: jax.Array, g: jax.Array):
    """The decays enter and leave [B, H, sequences, Sq] (0 outside a sequence) and total [B, sequences, H, 1]."""
    s, t = jnp.arange(p.Sq)[:, None], jnp.arange(p.Sq)[None, :]
    near = (s <= t) if p.before else (s >= t)  # s lies between where the state enters and t, both included
    g = jnp.where(member, g[:, :, None], 0)
    g = jnp.broadcast_to(g, (p.B, *g.shape[1:]))
    enter = jnp.exp(jnp.where(near, g[..., :, None], 0).sum(axis=-2))
    leave = jnp.exp(jnp.where(near, 0, g[..., :, None]).sum(axis=-2))
    total = jnp.moveaxis(jnp.exp(g.sum(axis=-1)), 1, 2)[..., None]
    return jnp.where(member, enter, 0), jnp.where(member, leave, 0), total

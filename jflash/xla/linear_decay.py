"""The decays of a chunk, from the log decay of each of its tokens, by sums that never cancel.

A sum over the tokens between j and i is not taken as a difference of two running sums: that loses the digits
of a weak decay next to a strong one, and is NaN after a log decay of -inf.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jflash.xla.linear_heads import product

_BLOCK = 16


class Decay(NamedTuple):
    """Factors of one chunk, or their logs, to multiply [..., C, C], [..., C, D], [..., C, D] and [..., D, Dv]."""

    within: jax.Array  # from token j (column) to token i (row); 0 where i does not see j
    enter: jax.Array  # from outside to each token, its own decay included
    leave: jax.Array  # from each token to the far side of the chunk, its own decay left out
    total: jax.Array  # through the whole chunk


def decay_of(g: jax.Array | None, size: int, dtype, reverse: bool, diagonal: bool) -> Decay:
    """The decay of chunks [..., C] of C = size tokens, a power of two, with log decays g; None is no decay.

    `reverse`: tokens see later ones. `diagonal`: they see themselves.
    """
    if g is None:
        one = jnp.ones((), dtype)
        within = jnp.tri(size, k=0 if diagonal else -1, dtype=dtype)
        return Decay(within.T if reverse else within, one, one, one)
    decay = jax.tree.map(jnp.exp, _logs(g, reverse))
    return decay if diagonal else decay._replace(within=jnp.where(_eye(size), 0, decay.within))


def gradient(logs: Decay, reverse: bool) -> jax.Array:
    """The cotangent of g [..., C] from those of the logs of the factors."""
    if reverse:
        logs = _flipped(logs)
    enter, leave = logs.enter[..., 0], logs.leave[..., 0]
    dg = _across(logs.within) + enter + _after(enter) + _before(leave) + logs.total[..., 0]
    return jnp.flip(dg, axis=-1) if reverse else dg


def _logs(g: jax.Array, reverse: bool) -> Decay:
    if reverse:
        return _flipped(_logs(jnp.flip(g, axis=-1), reverse=False))
    enter = _up_to(g)
    return Decay(between(g), enter[..., None], _after(g)[..., None], enter[..., -1:, None])


def _flipped(x: Decay) -> Decay:
    """The same with time reversed."""
    return Decay(jnp.flip(x.within, axis=(-2, -1)), jnp.flip(x.enter, axis=-2), jnp.flip(x.leave, axis=-2), x.total)


def between(g: jax.Array) -> jax.Array:
    """[..., C] -> [..., C, C], the sum of g[s] over j < s <= i, and -inf above the diagonal.

    In blocks: what is left of j's block, the blocks between, and what i's block has had.
    """
    size = g.shape[-1]
    block = min(_BLOCK, size)
    g = g.reshape(*g.shape[:-1], size // block, block)
    m = size // block
    own = _spans(g, last=True)
    gap = _spans(g.sum(axis=-1), last=False)
    across = _up_to(g)[..., :, :, None, None] + gap[..., :, None, :, None] + _after(g)[..., None, None, :, :]
    sums = jnp.where(_eye(m)[:, None, :, None], own[..., :, :, None, :], across)
    sums = sums.reshape(*sums.shape[:-4], size, size)
    return jnp.where(jnp.tri(size, dtype=bool), sums, -jnp.inf)


def _across(x: jax.Array) -> jax.Array:
    """[..., C, C] -> [..., C], the sum of x[i, j] over j < s <= i: the transpose of `between`."""
    size = x.shape[-1]
    block = min(_BLOCK, size)
    blocks = x.reshape(*x.shape[:-2], size // block, block, size)
    own = product("is,...mij->...msj", jnp.tri(block, dtype=x.dtype), blocks)
    later = product("nm,...nj->...mj", jnp.tri(size // block, k=-1, dtype=x.dtype), own[..., 0, :])
    rows = (own + later[..., None, :]).reshape(x.shape)  # at [s, j]: summed over s <= i
    return jnp.where(jnp.tri(size, k=-1, dtype=bool), rows, 0).sum(axis=-1)


def _spans(x: jax.Array, last: bool) -> jax.Array:
    """[..., n] -> [..., n, n], the sum of x[s] over j < s < i, or j < s <= i if last."""
    n = x.shape[-1]
    i, j, s = jnp.arange(n)[:, None, None], jnp.arange(n)[:, None], jnp.arange(n)
    inside = (j < s) & ((s <= i) if last else (s < i))
    return jnp.where(inside, x[..., None, None, :], 0).sum(axis=-1)


def _up_to(x: jax.Array) -> jax.Array:
    """Sums of what is not later, along the last axis."""
    return jnp.where(jnp.tri(x.shape[-1], dtype=bool), x[..., None, :], 0).sum(axis=-1)


def _before(x: jax.Array) -> jax.Array:
    """Sums of what is earlier, along the last axis."""
    return jnp.where(jnp.tri(x.shape[-1], k=-1, dtype=bool), x[..., None, :], 0).sum(axis=-1)


def _after(x: jax.Array) -> jax.Array:
    """Sums of what is later, along the last axis."""
    return jnp.where(jnp.tri(x.shape[-1], dtype=bool), 0, x[..., None, :]).sum(axis=-1)


def _eye(n: int) -> jax.Array:
    return jnp.eye(n, dtype=bool)

"""Packed sequences as one: a log decay of -inf, which forgets, where the walk enters a sequence.

What is forgotten is left with a factor of 2^-100: a token that is not finite is seen by the sequences beyond it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.problem import LinearArrays, LinearProblem


def cleaned(p: LinearProblem, a: LinearArrays) -> LinearArrays:
    """The arrays with zeros behind the last sequence."""
    arrays = a._replace(**{name: inside(p, a, getattr(a, name)) for name in ("q", "k", "v")})
    if p.decay == "token":
        arrays = arrays._replace(log_decay=inside(p, a, a.log_decay))
    return arrays


def inside(p: LinearProblem, a: LinearArrays, x: jax.Array) -> jax.Array:
    """x [1, S, ...] with zeros behind the last sequence."""
    assert a.cu_seqlens is not None
    token = jnp.arange(p.Sq).reshape(-1, *(1,) * (x.ndim - 2))
    return jnp.where(token < a.cu_seqlens[-1], x, 0)


def forgetting(p: LinearProblem, a: LinearArrays) -> tuple[LinearProblem, LinearArrays, jax.Array | None]:
    """A causal call as one of a single sequence, and bool [1, S, 1]: the tokens that were made to forget, if any."""
    if a.cu_seqlens is None:
        return p, a, None
    borders = a.cu_seqlens[:-1] if p.before else a.cu_seqlens[1:] - 1
    forget = jnp.zeros(p.Sq, bool).at[borders].set(True, mode="drop")[None, :, None]
    g = jnp.zeros((1, 1, p.H)) if a.log_decay is None else a.log_decay.astype(jnp.float32)
    arrays = a._replace(log_decay=jnp.where(forget, -jnp.inf, g), cu_seqlens=None)
    return dataclasses.replace(p, decay="token", sequences=None), arrays, forget

"""Calls of linear attention, made of causal ones.

    both ways    the pass forward and, without the diagonal, the pass back
    normalized   out_i = L(q, k, v)_i / n_i, with n_i = scale q_i . L(1, 1, k)_i: the weights of a query sum to
                 scale times its product with the decayed sum of the keys

See `linear_packed` for packed sequences and `linear_full` for queries that see every key alike.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.hopper import linear_gradients as causal
from pallas_kernels.hopper import linear_packed as packed
from pallas_kernels.hopper.linear_full import full_forward, full_gradients
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem, LinearResults


def forward(p: LinearProblem, a: LinearArrays, *, interpret: _compat.Interpret = None) -> LinearResults:
    """out in the input dtype; norm and the state in float32. Packed calls have no state."""
    if p.sequences is None:
        return _forward(p, a, interpret)
    return _forward(p, packed.cleaned(p, a), interpret)._replace(kv=None, z=None)


def backward(
    p: LinearProblem, a: LinearArrays, out, norm, d_out, d_kv, d_z, *, interpret: _compat.Interpret = None
) -> LinearGradients:
    """Gradients of q, k, v, log_decay, kv and z, from the cotangents of out and of the final state."""
    if p.sequences is None:
        return _backward(p, a, out, norm, d_out, d_kv, d_z, interpret)
    return _backward(p, packed.cleaned(p, a), out, norm, packed.inside(p, a, d_out), None, None, interpret)


def _forward(p: LinearProblem, a: LinearArrays, interpret: _compat.Interpret) -> LinearResults:
    if not p.normalize:
        return _weigh(p, a, interpret)
    total, sums = _weigh(*_without_norm(p, a), interpret), _weigh(*_of_keys(p, a), interpret)
    norm = p.scale * (_wide(p, a.q) * sums.out).sum(axis=-1)
    out = total.out * _inverse(norm)
    return LinearResults(out.astype(p.dtype), norm, total.kv, None if sums.kv is None else sums.kv[:, :, 0])


def _backward(
    p: LinearProblem, a: LinearArrays, out, norm, d_out, d_kv, d_z, interpret: _compat.Interpret
) -> LinearGradients:
    if not p.normalize:
        return _gradients(p, a, d_out, d_kv, interpret)
    d_total = d_out * _inverse(norm)
    d_norm = -p.scale * (d_total * out).sum(axis=-1, keepdims=True)
    of_total = _gradients(*_without_norm(p, a), d_total.astype(p.dtype), d_kv, interpret)
    of_keys = _of_keys(p, a)
    d_sums = (d_norm * _wide(p, a.q)).astype(p.dtype)
    of_sums = _gradients(*of_keys, d_sums, None if d_z is None else d_z[:, :, None], interpret)
    dq = causal.shared(d_norm * _weigh(*of_keys, interpret).out, a.q)
    decays = (of_total.log_decay, of_sums.log_decay)
    return LinearGradients(
        q=of_total.q + dq,
        k=of_total.k + of_sums.v,
        v=of_total.v,
        log_decay=jax.tree.map(operator.add, *decays),
        kv=of_total.kv,
        z=None if of_sums.kv is None else of_sums.kv[:, :, 0],
    )


def _weigh(p: LinearProblem, a: LinearArrays, interpret: _compat.Interpret) -> LinearResults:
    """out without a norm, and the state of a causal call."""
    if _is_uniform(p):
        return full_forward(p, a, interpret=interpret)

    def one(way: LinearProblem) -> LinearResults:
        way, arrays, _ = packed.forgetting(way, a)
        return causal.linear_forward(way, arrays, diagonal=p.causal or way.before, interpret=interpret)

    found = [one(way) for way in _ways(p)]
    return LinearResults(functools.reduce(operator.add, [x.out for x in found]), kv=found[0].kv if p.causal else None)


def _gradients(p: LinearProblem, a: LinearArrays, d_out, d_kv, interpret: _compat.Interpret) -> LinearGradients:
    """Gradients of a call without a norm."""
    if _is_uniform(p):
        return full_gradients(p, a, d_out, interpret=interpret)

    def one(way: LinearProblem) -> LinearGradients:
        way, arrays, forgotten = packed.forgetting(way, a)
        diagonal = p.causal or way.before
        found = causal.linear_gradients(way, arrays, d_out, d_kv, diagonal=diagonal, interpret=interpret)
        if forgotten is None or found.log_decay is None:
            return found
        return found._replace(log_decay=causal.summed_to(a.log_decay, jnp.where(forgotten, 0, found.log_decay)))

    return jax.tree.map(lambda *parts: functools.reduce(operator.add, parts), *map(one, _ways(p)))


def _ways(p: LinearProblem) -> list[LinearProblem]:
    """The causal calls whose sum is the call; of two, the second is without the diagonal."""
    if p.causal:
        return [p]
    return [dataclasses.replace(p, after=False), dataclasses.replace(p, before=False)]


def _is_uniform(p: LinearProblem) -> bool:
    """Every query sees every key alike."""
    return not p.causal and p.decay is None and p.sequences is None


def _without_norm(p: LinearProblem, a: LinearArrays) -> tuple[LinearProblem, LinearArrays]:
    return dataclasses.replace(p, normalize=False), a._replace(z=None)


def _of_keys(p: LinearProblem, a: LinearArrays) -> tuple[LinearProblem, LinearArrays]:
    """The decayed sum of the keys that each query sees, of every head: k in the place of v, ones in that of q and k."""
    q, k = (jnp.ones((*x.shape[:2], 1, 1), x.dtype) for x in (a.q, a.k))
    problem = dataclasses.replace(p, Hq=1, Hk=1, Hv=p.Hk, D=1, Dv=p.D, scale=1.0, normalize=False)
    return problem, a._replace(q=q, k=k, v=a.k, kv=None if a.z is None else a.z[:, :, None], z=None)


def _wide(p: LinearProblem, q: jax.Array) -> jax.Array:
    """q of every head, in float32."""
    return jnp.repeat(q, p.H // q.shape[2], axis=2).astype(jnp.float32)


def _inverse(norm: jax.Array) -> jax.Array:
    """1 / norm [..., None], 0 where that is 0."""
    some = norm != 0
    return jnp.where(some, 1 / jnp.where(some, norm, 1), 0)[..., None]

"""Causal linear attention and its gradients, all by `linear_scan` with exchanged operands.

With M the decays, out = scale (M * q k^T) v has

    dq = scale (M * dO v^T) k    dk = scale (M * dO v^T)^T q    dv = scale (M * q k^T)^T dO

dq is a pass of (dO, v, k) in the direction of the forward, whose state is that of the forward transposed; dk
and dv are adjoint passes of (v, dO, q) and (k, q, dO) against it, whose state is the cotangent of the
forward's. Nothing of the forward is stored.

The gradient of a log decay sums w dw over the pairs that it lies between. Within a chunk that is a running sum
of q . dq - k . dk: the pairs on one side of the token cancel to the last bit, as both passes round alike. Left
over are the pairs through a state: those of the chunk's keys, and those that span the chunk, which are those
that cross one of its edges, <S, dS> there, less those of its own tokens. Every second edge has its states stored.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels.hopper.linear_scan import CHUNK, WINDOW, Scan, ScanResults, linear_scan, sums
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem, LinearResults

_NOTHING_SPANS = -10.0  # log2 of a chunk's decay: less is lost than in rounding <S, dS> to 16 bits


def linear_forward(p: LinearProblem, a: LinearArrays, *, interpret: _compat.Interpret = None) -> LinearResults:
    """out [B, S, H, Dv] in the input dtype and kv [B, H, D, Dv] in float32."""
    found = linear_scan(_scan(p), a.q, a.k, a.v, a.log_decay, a.kv, interpret=interpret)
    return LinearResults(found.out, kv=found.final)


def linear_gradients(
    p: LinearProblem, a: LinearArrays, d_out, d_kv, *, interpret: _compat.Interpret = None
) -> LinearGradients:
    """Gradients of q, k, v, log_decay and kv, from the cotangents of out and of the final state."""
    swapped = dataclasses.replace(_scan(p), D=p.Dv, Dv=p.D)
    adjoint = functools.partial(dataclasses.replace, later=p.before, adjoint=True)
    partners = (a.q, a.k) if p.decay_gradient else (None, None)
    scan = functools.partial(linear_scan, interpret=interpret)
    # What enters an adjoint pass leaves it times scale.
    d_end = None if d_kv is None else d_kv / p.scale
    dq = scan(swapped, d_out, a.v, a.k, a.log_decay, _transposed(a.kv), partners[0])
    dk = scan(adjoint(swapped), a.v, d_out, a.q, a.log_decay, _transposed(d_end), partners[1])
    dv = scan(adjoint(_scan(p)), a.k, a.q, d_out, a.log_decay, d_end)
    return LinearGradients(
        q=_shared(dq.out, a.q),
        k=_shared(dk.out, a.k),
        v=_shared(dv.out, a.v),
        log_decay=_decay_gradient(p, a.log_decay, dq, dk) if p.decay_gradient else None,
        kv=dv.final * p.scale if p.initial_state else None,
    )


def _scan(p: LinearProblem) -> Scan:
    return Scan(B=p.B, H=p.H, S=p.Sq, D=p.D, Dv=p.Dv, dtype=p.dtype, scale=p.scale, later=p.after)


def _transposed(state: jax.Array | None) -> jax.Array | None:
    return None if state is None else jnp.swapaxes(state, 2, 3)


def _shared(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """gradient [B, S, H, D] summed over the heads that share one of x."""
    B, S, heads, D = x.shape
    if gradient.shape[2] == heads:
        return gradient
    return gradient.reshape(B, S, heads, -1, D).sum(axis=3, dtype=jnp.float32).astype(x.dtype)


def _decay_gradient(p: LinearProblem, log_decay, dq: ScanResults, dk: ScanResults) -> jax.Array:
    """The gradient of log_decay, in its shape and dtype."""
    assert dq.dots is not None
    assert dk.dots is not None
    scan = _scan(p)
    of_q, of_k = (dots[:, :, 0].sum(axis=-1) for dots in (dq.dots, dk.dots))  # through a state, [B, H, chunks]
    chunk = jnp.arange(scan.chunks)
    left, right = (of_q, of_k) if p.before else (of_k, of_q)
    spanning = _crossing(p, dq, dk)[..., (chunk + 1) // WINDOW] - jnp.where(chunk % WINDOW == 0, left, right)
    decays = sums(scan, log_decay).reshape(-1, p.H, scan.chunks, CHUNK)[..., -1 if p.before else 0]
    spanning = jnp.where(decays > _NOTHING_SPANS, spanning, 0)
    dg = lax.cumsum(dq.dots[:, :, 1] - dk.dots[:, :, 1], axis=3, reverse=p.before) + (of_k + spanning)[..., None]
    dg = jnp.moveaxis(dg.reshape(p.B, p.H, -1)[:, :, : p.Sq], 1, 2)
    axes = tuple(axis for axis, n in enumerate(log_decay.shape) if n != dg.shape[axis])
    return dg.sum(axis=axes, keepdims=True).astype(log_decay.dtype)


def _crossing(p: LinearProblem, dq: ScanResults, dk: ScanResults) -> jax.Array:
    """<S, dS> [B, H, windows + 1] on the edges of the windows, the first to the last in time."""
    assert dq.anchors is not None
    assert dk.anchors is not None

    def inner(x, y):
        return p.scale * (x.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=(-2, -1))

    # Where a pass enters the windows, and where it ends.
    s, s_end, ds, ds_end = dq.anchors, dq.final[:, :, None], dk.anchors, dk.final[:, :, None]
    if p.before:
        parts = inner(s[:, :, :1], ds_end), inner(s[:, :, 1:], ds[:, :, :-1]), inner(s_end, ds[:, :, -1:])
    else:
        parts = inner(s_end, ds[:, :, :1]), inner(s[:, :, :-1], ds[:, :, 1:]), inner(s[:, :, -1:], ds_end)
    return jnp.concatenate(parts, axis=2)

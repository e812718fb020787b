"""Few heads would leave most of the GPU idle: a pass over segments of time, side by side as entries of a batch.

What enters a segment is found first: the segments' own sums of k v^T by matrix products of XLA, which read k
and v once more, and a short scan over the segments.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels.hopper.linear_scan import Scan, ScanResults, Terms, linear_scan, make_plan
from pallas_kernels.parts.decay import CHUNK
from pallas_kernels.parts.schedule import SMS

_SHORTEST = 8  # chunks of a segment: below, finding what enters costs more than it brings


def linear_scan_split(
    scan: Scan, q, k, v, log_decay=None, initial=None, partner=None, *, interpret: _compat.Interpret = None
) -> ScanResults:
    """As `linear_scan`."""
    n = segments(scan)
    if n == 1:
        return linear_scan(scan, q, k, v, log_decay, initial, partner, interpret=interpret)
    q, k, v, partner = (None if x is None else _cut(x, n) for x in (q, k, v, partner))
    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay, (scan.B, *log_decay.shape[1:]))
        log_decay = jnp.repeat(log_decay, n, axis=0) if log_decay.shape[1] == 1 else _cut(log_decay, n)
    part = dataclasses.replace(scan, B=scan.B * n, S=scan.S // n)
    entering = _entering(part, n, k, v, log_decay, initial)
    found = linear_scan(part, q, k, v, log_decay, entering, partner, interpret=interpret)
    out = found.out.reshape(scan.B, scan.S, *found.out.shape[2:])
    final = found.final.reshape(scan.B, n, *found.final.shape[1:])[:, 0 if scan.later else -1]
    terms = None if found.terms is None else Terms(*(_joined(x, n) for x in found.terms))
    return ScanResults(out, final, terms)


def segments(scan: Scan) -> int:
    """Into how many the tokens are cut: no more than fill the GPU, each of whole chunks and of one length."""
    plan = make_plan(scan, partnered=False)
    room = SMS * plan.tile.ctas // (scan.B * scan.H * plan.slices)
    whole = scan.S // CHUNK if scan.S % CHUNK == 0 else 1
    fitting = [n for n in range(1, room + 1) if whole % n == 0 and whole // n >= _SHORTEST]
    return max(fitting, default=1)


def _cut(x: jax.Array, n: int) -> jax.Array:
    """[B, S, ...] -> [B n, S / n, ...]."""
    return x.reshape(x.shape[0] * n, x.shape[1] // n, *x.shape[2:])


def _joined(x: jax.Array, n: int) -> jax.Array:
    """[B n, H, chunks, ...] -> [B, H, n chunks, ...]."""
    x = jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _entering(part: Scan, n: int, k, v, log_decay, initial) -> jax.Array:
    """The state that enters each segment, [B n, H, D, Dv]."""
    left, total = v, jnp.ones((1, part.H))
    if log_decay is not None:
        g = jnp.broadcast_to(log_decay, (log_decay.shape[0], part.S, part.H)).astype(jnp.float32)
        total = jnp.exp(g.sum(axis=1))
        left = _spread(v, part.H) * jnp.exp(_until_leaving(part, g))[..., None]
    shape = (-1, n, part.H, part.D, part.Dv)
    own = jnp.einsum(
        "bshd,bshv->bhdv",
        _spread(k, part.H),
        _spread(left, part.H).astype(v.dtype),
        preferred_element_type=jnp.float32,
    )
    own = own.reshape(shape)
    total = jnp.broadcast_to(total, (part.B, part.H)).reshape(-1, n, part.H, 1, 1)
    first = jnp.zeros_like(own[:, 0]) if initial is None else initial

    def step(state, segment):
        own, total = segment
        return total * state + own, state

    walk = jnp.moveaxis(own, 1, 0), jnp.moveaxis(total, 1, 0)
    _, entering = lax.scan(step, first, walk, reverse=part.later)
    return jnp.moveaxis(entering, 0, 1).reshape(part.B, part.H, part.D, part.Dv)


def _until_leaving(part: Scan, g: jax.Array) -> jax.Array:
    """The sum of log decays from each token to where the walk leaves its segment."""
    past = lax.cumsum(g, axis=1, reverse=not part.later)  # its own included
    if part.adjoint:
        return past
    none = jnp.zeros_like(past[:, :1])
    return jnp.concatenate([none, past[:, :-1]] if part.later else [past[:, 1:], none], axis=1)


def _spread(x: jax.Array, heads: int) -> jax.Array:
    return jnp.repeat(x, heads // x.shape[2], axis=2)

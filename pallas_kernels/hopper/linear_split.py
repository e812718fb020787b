"""Few heads would leave most of the GPU idle: a pass over segments of time, side by side as entries of a batch.

What enters a segment is found first: a pass over all but the last of them reads k and v and keeps the states
alone, and a short scan over the segments joins these.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels.hopper.linear_scan import Scan, ScanResults, Terms, linear_scan, linear_states, make_plan
from pallas_kernels.parts.decay import CHUNK
from pallas_kernels.parts.schedule import SMS

_SHORTEST = 8  # chunks of a segment: below, finding what enters costs more than it brings


def linear_scan_split(
    scan: Scan, q, k, v, log_decay=None, entering=None, partner=None, *, interpret: _compat.Interpret = None
) -> ScanResults:
    """As `linear_scan`, from the states of `entering_states`."""
    n = 1 if entering is None else entering.shape[0] // scan.B
    if n == 1:
        return linear_scan(scan, q, k, v, log_decay, entering, partner, interpret=interpret)
    q, k, v, partner = (None if x is None else _cut(x, n) for x in (q, k, v, partner))
    part = _segment(scan, n)
    found = linear_scan(part, q, k, v, _cut_decay(scan, log_decay, n), entering, partner, interpret=interpret)
    out = found.out.reshape(scan.B, scan.S, *found.out.shape[2:])
    final = found.final.reshape(scan.B, n, *found.final.shape[1:])[:, 0 if scan.later else -1]
    terms = None if found.terms is None else Terms(*(_joined(x, n) for x in found.terms))
    return ScanResults(out, final, terms)


def entering_states(
    scan: Scan, k, v, log_decay=None, initial=None, *, interpret: _compat.Interpret = None
) -> jax.Array | None:
    """The state that enters each of n segments, [B n, H, D, Dv]; `initial` where one is enough."""
    n = segments(scan)
    if n == 1:
        return initial
    part, g = _segment(scan, n), _cut_decay(scan, log_decay, n)
    own = linear_states(part, n, _cut(k, n), _cut(v, n), g, interpret=interpret)
    own = own.reshape(scan.B, n, *own.shape[1:])
    total = jnp.ones((scan.B, n, scan.H, 1, 1))
    if g is not None:
        sums = jnp.broadcast_to(g.astype(jnp.float32), (g.shape[0], part.S, part.H)).sum(axis=1)
        total = jnp.exp(jnp.broadcast_to(sums, (part.B, part.H))).reshape(total.shape)
    first = jnp.zeros_like(own[:, 0]) if initial is None else initial

    def step(state, segment):
        own, total = segment
        return total * state + own, state

    walk = jnp.moveaxis(own, 1, 0), jnp.moveaxis(total, 1, 0)
    _, entering = lax.scan(step, first, walk, reverse=scan.later, unroll=min(n, 8))
    return jnp.moveaxis(entering, 0, 1).reshape(part.B, *own.shape[2:])


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


def _segment(scan: Scan, n: int) -> Scan:
    return dataclasses.replace(scan, B=scan.B * n, S=scan.S // n)


def _cut_decay(scan: Scan, g: jax.Array | None, n: int) -> jax.Array | None:
    """log_decay of the segments."""
    if g is None or g.shape[:2] == (1, 1):
        return g
    if g.shape[1] == 1:
        return jnp.repeat(g, n, axis=0)
    return _cut(jnp.broadcast_to(g, (scan.B, *g.shape[1:])), n)

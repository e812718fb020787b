"""Few heads would leave most of the GPU idle: a pass over segments of time, side by side as entries of a batch.

What enters a segment is the sum of what those before it leave behind: a pass over all but the last of them
reads k and v and keeps the states alone, and each CTA of the next pass sums up what it needs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.hopper.linear_plan import Scan, make_plan
from pallas_kernels.hopper.linear_scan import ZEROS, Entering, ScanResults, linear_scan, linear_states
from pallas_kernels.parts.decay import CHUNK
from pallas_kernels.parts.schedule import SMS

_SHORTEST = 8  # chunks of a segment: below, finding what enters costs more than it brings


def segments(scan: Scan) -> int:
    """Into how many the tokens are cut: no more than fill the GPU, each of whole chunks and of one length."""
    plan = make_plan(scan)
    room = SMS * plan.tile.ctas // (scan.B * scan.H * plan.slices)
    whole = scan.S // CHUNK if scan.S % CHUNK == 0 else 1
    fitting = [n for n in range(1, room + 1) if whole % n == 0 and whole // n >= _SHORTEST]
    return max(fitting, default=1)


def entering_states(
    scan: Scan, n: int, k, v, log_decay=None, initial=None, *, interpret: _compat.Interpret = None
) -> Entering:
    """What enters each of n segments, from `initial` [B, H, D, Dv] on."""
    if n == 1:
        return Entering(1, initial)
    part, g = _segment(scan, n), _cut_decay(scan, log_decay, n)
    own = linear_states(part, n, n - 1, _cut(k, n), _cut(v, n), g, interpret=interpret)
    if g is None:
        return Entering(n, initial, own)
    sums = jnp.broadcast_to(g.astype(jnp.float32), (g.shape[0], part.S, part.H)).sum(axis=1)
    return Entering(n, initial, own, jnp.exp(jnp.broadcast_to(sums, (part.B, part.H))))


def linear_scan_split(
    scan: Scan, q, k, v, log_decay=None, entering=ZEROS, partner=None, opposite=None, *,
    interpret: _compat.Interpret = None,
) -> ScanResults:  # fmt: skip
    """As `linear_scan`, in the segments of what enters; states and `opposite` are those of segments."""
    n = entering.segments
    if n == 1:
        return linear_scan(scan, q, k, v, log_decay, entering, partner, opposite, interpret=interpret)
    q, k, v, partner = (None if x is None else _cut(x, n) for x in (q, k, v, partner))
    g = _cut_decay(scan, log_decay, n)
    found = linear_scan(_segment(scan, n), q, k, v, g, entering, partner, opposite, interpret=interpret)
    out = found.out.reshape(scan.B, scan.S, *found.out.shape[2:])
    final = found.final.reshape(scan.B, n, *found.final.shape[1:])[:, 0 if scan.later else -1]
    return ScanResults(out, final, None if found.dots is None else joined(found.dots, n), found.states)


def states_of_all(scan: Scan, k, v, *, interpret: _compat.Interpret = None) -> jax.Array:
    """The sum of k v^T over all tokens, float32 [B, H, D, Dv]."""
    n = segments(scan)
    own = linear_states(_segment(scan, n), n, n, _cut(k, n), _cut(v, n), interpret=interpret)
    return own.reshape(scan.B, n, *own.shape[1:]).sum(axis=1)


def _cut(x: jax.Array, n: int) -> jax.Array:
    """[B, S, ...] -> [B n, S / n, ...]."""
    return x.reshape(x.shape[0] * n, x.shape[1] // n, *x.shape[2:])


def joined(x: jax.Array, n: int) -> jax.Array:
    """[kinds, B n, H, chunks, m] -> [kinds, B, H, n chunks, m]."""
    kinds, entries, H, _, m = x.shape
    return jnp.moveaxis(x.reshape(kinds, entries // n, n, H, -1, m), 2, 3).reshape(kinds, entries // n, H, -1, m)


def _segment(scan: Scan, n: int) -> Scan:
    return dataclasses.replace(scan, B=scan.B * n, S=scan.S // n)


def _cut_decay(scan: Scan, g: jax.Array | None, n: int) -> jax.Array | None:
    """log_decay of the segments."""
    if g is None or g.shape[:2] == (1, 1):
        return g
    if g.shape[1] == 1:
        return jnp.repeat(g, n, axis=0)
    return _cut(jnp.broadcast_to(g, (scan.B, *g.shape[1:])), n)

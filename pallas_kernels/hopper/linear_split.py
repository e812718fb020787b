"""Few heads would leave most of the GPU idle: time is cut into segments that are walked side by side.

What enters a segment is the sum of what those before it leave behind: a pass over all but the last of them
reads k and v and keeps the states alone, and each CTA of the next pass sums up what it needs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import _compat
from pallas_kernels.hopper.linear_plan import Scan, make_plan
from pallas_kernels.hopper.linear_scan import Entering, linear_states
from pallas_kernels.parts.decay import CHUNK
from pallas_kernels.parts.schedule import SMS

_SHORTEST = 8  # chunks of a segment: below, finding what enters costs more than it brings


def segments(scan: Scan) -> int:
    """Into how many the tokens are cut: no more than fill the GPU, each of whole chunks, the last maybe shorter."""
    plan = make_plan(scan)
    room = SMS * plan.tile.ctas // (scan.B * scan.H * plan.slices)
    length = -(-scan.chunks // max(1, min(room, scan.chunks // _SHORTEST)))
    return -(-scan.chunks // length)


def entering_states(
    scan: Scan, n: int, k, v, log_decay=None, initial=None, *, interpret: _compat.Interpret = None
) -> Entering:
    """What enters each of n segments, from `initial` [B, H, D, Dv] on."""
    if n == 1:
        return Entering(1, initial)
    own = linear_states(scan, n, n - 1, k, v, log_decay, interpret=interpret)
    if log_decay is None:
        return Entering(n, initial, own)
    g = jnp.broadcast_to(log_decay.astype(jnp.float32), (log_decay.shape[0], scan.S, scan.H))
    length = -(-scan.chunks // n) * CHUNK
    sums = jnp.pad(g, ((0, 0), (0, n * length - scan.S), (0, 0))).reshape(-1, n, length, scan.H).sum(axis=2)
    return Entering(n, initial, own, jnp.exp(jnp.broadcast_to(sums, (scan.B, n, scan.H))).reshape(-1, scan.H))


def states_of_all(scan: Scan, k, v, *, interpret: _compat.Interpret = None) -> jax.Array:
    """The sum of k v^T over all tokens, float32 [B, H, D, Dv]."""
    n = segments(scan)
    own = linear_states(scan, n, n, k, v, interpret=interpret)
    return own.reshape(scan.B, n, *own.shape[1:]).sum(axis=1)

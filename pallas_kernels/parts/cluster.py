"""Neighbouring CTAs that share what they load: each brings a part of a tile into the shared memory of all of them.

A slot may be filled again when the consumers of all of them have given it back. `size` is CTAs in a cluster; with 1
there is none, and nothing of this in the kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

_AXIS = "neighbour"


def launch(size: int) -> dict[str, int] | None:
    """The cluster of `_compat.kernel`."""
    return {_AXIS: size} if size > 1 else None


def axis(size: int) -> str | None:
    """What `Tiles.load` shares a load along."""
    return _AXIS if size > 1 else None


def member(size: int) -> jax.Array | int:
    """The number of this CTA in its cluster."""
    return lax.axis_index(_AXIS) if size > 1 else 0


def empty(size: int, consumers: int, slots: int):
    """Barriers at which consumers give back slots."""
    if size == 1:
        return plgpu.Barrier(num_arrivals=consumers, num_barriers=slots)
    return plgpu.ClusterBarrier(collective_axes=(_AXIS,), num_arrivals=consumers, num_barriers=slots)


def leave(size: int, barriers, done, slots: int) -> None:
    """Ends a producer that has filled `done` slots: its neighbours report to this CTA, which must not be gone."""
    if size > 1:
        wait = lambda n, _: plgpu.barrier_wait(barriers.at[lax.rem(n, slots)])  # noqa: E731
        lax.fori_loop(jnp.maximum(done - slots, 0), done, wait, None)

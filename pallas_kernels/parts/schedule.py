"""The order in which CTAs take the tiles of a problem, as arithmetic on a one-dimensional grid.

Heads go in sections small enough that what every tile of a head re-reads stays in L2. Inside a section the
row block is the slow axis, longest rows first under a causal mask, so that the tail is made of short tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Work(NamedTuple):
    """The tile of one CTA: batch, head, and block of rows."""

    b: jax.Array
    h: jax.Array
    block: jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    batch: int
    heads: int
    blocks: int
    section: int  # heads (over all batches) that share L2
    descending: bool  # last row block first
    ctas: int  # fewer than tiles: each takes several

    @property
    def tiles(self) -> int:
        return self.batch * self.heads * self.blocks

    @property
    def persistent(self) -> bool:
        """Whether a CTA takes more than one tile."""
        return self.ctas < self.tiles

    @property
    def grid(self) -> tuple[int]:
        return (self.ctas,)

    def work(self, index: jax.Array) -> Work:
        """The tile of that index in the order."""
        of_section = self.section * self.blocks
        section, rest = lax.div(index, jnp.int32(of_section)), lax.rem(index, jnp.int32(of_section))
        block = lax.div(rest, jnp.int32(self.section))
        head = section * self.section + lax.rem(rest, jnp.int32(self.section))
        if self.descending:
            block = self.blocks - 1 - block
        return Work(lax.div(head, jnp.int32(self.heads)), lax.rem(head, jnp.int32(self.heads)), block)


def for_each_tile(plan: Schedule, take: Callable) -> None:
    """Runs done = take(work, done) over the tiles of this CTA, with 0 for the first.

    Rounds run through the order forwards and backwards in turn, so that the CTA that got the longest tile of
    one round gets the shortest of the next.
    """
    cta = lax.axis_index("cta")
    if not plan.persistent:
        take(plan.work(cta), 0)
        return

    def index(turn):
        return turn * plan.ctas + jnp.where(lax.rem(turn, 2) == 0, cta, plan.ctas - 1 - cta)

    whole = plan.tiles // plan.ctas
    turns = whole + (index(jnp.int32(whole)) < plan.tiles).astype(jnp.int32)
    lax.fori_loop(0, turns, lambda turn, done: take(plan.work(index(turn)), done), jnp.int32(0))


def section(heads: int, group: int, bytes_per_group: int, budget: int = 32 * 2**20) -> int:
    """The largest divisor of `heads`, in whole groups if possible, whose keys and values fit the budget."""
    most = group * max(1, budget // bytes_per_group)
    return next(n for n in range(min(heads, most), 0, -1) if heads % n == 0)

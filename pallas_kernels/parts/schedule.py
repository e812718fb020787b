"""The order in which CTAs take the tiles of a problem, as arithmetic on a one-dimensional grid.

Heads go in sections small enough that what every tile of a head re-reads stays in L2. Inside a section the
row block is the slow axis, longest rows first under a causal mask, so that the tail is made of short tiles.
"""

from __future__ import annotations

import dataclasses
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

    @property
    def grid(self) -> tuple[int]:
        return (self.batch * self.heads * self.blocks,)

    def work(self, index: jax.Array) -> Work:
        """The tile of CTA `index`."""
        of_section = self.section * self.blocks
        section, rest = lax.div(index, jnp.int32(of_section)), lax.rem(index, jnp.int32(of_section))
        block = lax.div(rest, jnp.int32(self.section))
        head = section * self.section + lax.rem(rest, jnp.int32(self.section))
        if self.descending:
            block = self.blocks - 1 - block
        return Work(lax.div(head, jnp.int32(self.heads)), lax.rem(head, jnp.int32(self.heads)), block)


def section(heads: int, group: int, bytes_per_group: int, budget: int = 32 * 2**20) -> int:
    """The largest divisor of `heads`, in whole groups if possible, whose keys and values fit the budget."""
    most = group * max(1, budget // bytes_per_group)
    return next(n for n in range(min(heads, most), 0, -1) if heads % n == 0)

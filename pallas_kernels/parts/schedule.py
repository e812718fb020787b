"""The order in which CTAs take the tiles of a problem.

Heads go in sections small enough that what every tile of a head re-reads stays in L2. Inside a section the
row block is the slow axis, longest rows first under a causal mask, so that the tail is made of short tiles.

With as many CTAs as tiles, the hardware hands them out in that order. Persistent CTAs, one an SM, read what
to take from a table: the tiles of the order, each given on the host to the CTA that will be free first.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SMS = 132  # of an H100 or H200


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
    descending: bool = False  # last row block first
    persistent: bool = False
    cluster: int = 1  # CTAs that take a tile together; `ctas` then counts clusters
    across_batch: bool = False  # one head of all batch entries after another, not all heads of one entry

    @property
    def tiles(self) -> int:
        return self.batch * self.heads * self.blocks

    @property
    def ctas(self) -> int:
        return min(max(1, SMS // self.cluster), self.tiles) if self.persistent else self.tiles

    def work(self, index: jax.Array) -> Work:
        """The tile of that index in the order."""
        of_section = self.section * self.blocks
        section, rest = lax.div(index, jnp.int32(of_section)), lax.rem(index, jnp.int32(of_section))
        block = lax.div(rest, jnp.int32(self.section))
        head = section * self.section + lax.rem(rest, jnp.int32(self.section))
        if self.descending:
            block = self.blocks - 1 - block
        if self.across_batch:
            return Work(lax.rem(head, jnp.int32(self.batch)), lax.div(head, jnp.int32(self.batch)), block)
        return Work(lax.div(head, jnp.int32(self.heads)), lax.rem(head, jnp.int32(self.heads)), block)

    def table(self, costs: Sequence[float]) -> np.ndarray:
        """For each CTA the indices of its tiles, int32 [ctas, most tiles of a CTA + 1], closed by -1.

        costs: the time of a tile of each block of rows.
        """
        in_section = np.repeat(np.asarray(costs, float)[:: -1 if self.descending else 1], self.section)
        taken: list[list[int]] = [[] for _ in range(self.ctas)]
        free = [(0.0, cta) for cta in range(self.ctas)]
        for index, cost in enumerate(np.tile(in_section, self.tiles // len(in_section))):
            time, cta = free[0]
            taken[cta].append(index)
            heapq.heapreplace(free, (time + cost, cta))
        rounds = max(map(len, taken)) + 1
        return np.array([tiles + [-1] * (rounds - len(tiles)) for tiles in taken], np.int32)


def placed(work: Work, order_gmem) -> Work:
    """The tile where blocks go by an order known at run time, int32 [B|1, blocks], or as it is."""
    if order_gmem is None:
        return work
    b = 0 if order_gmem.shape[0] == 1 else work.b
    return work._replace(block=order_gmem[b, work.block])


def for_each_tile(plan: Schedule, table_gmem, cta, take: Callable, start: Any = 0) -> Any:
    """Runs done = take(work, done) over the tiles of a persistent CTA, with `start` for the first; returns the last."""

    def step(carry):
        turn, index, done = carry
        following = table_gmem[cta, turn + 1]  # read ahead of its use
        return turn + 1, following, take(plan.work(index), done)

    carry = jnp.int32(0), table_gmem[cta, 0], jax.tree.map(jnp.int32, start)
    return lax.while_loop(lambda carry: carry[1] >= 0, step, carry)[2]


def section(heads: int, group: int, bytes_per_group: int, budget: int = 32 * 2**20) -> int:
    """The largest divisor of `heads`, in whole groups if possible, whose keys and values fit the budget."""
    most = group * max(1, budget // bytes_per_group)
    return next(n for n in range(min(heads, most), 0, -1) if heads % n == 0)

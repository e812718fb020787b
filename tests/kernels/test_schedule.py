"""The order in which CTAs take tiles, where no kernel's numbers would show a change."""

import jax.numpy as jnp
import pytest

from pallas_kernels.parts.schedule import Schedule


@pytest.mark.parametrize("across_batch", [False, True])
@pytest.mark.parametrize("section", [1, 3, 6])
def test_every_tile_once(section, across_batch):
    order = Schedule(batch=3, heads=4, blocks=5, section=section, descending=True, across_batch=across_batch)
    found = [tuple(int(x) for x in order.work(jnp.int32(n))) for n in range(order.tiles)]
    assert sorted(found) == [(b, h, block) for b in range(3) for h in range(4) for block in range(5)]
    blocks = [block for _, _, block in found[: 5 * section]]
    assert blocks == sorted(blocks, reverse=True), "the longest first"


def test_neighbours_share_a_head():
    """So that what a head's tiles read of a bias that all entries share is in L2 when the next entry's do."""
    order = Schedule(batch=3, heads=4, blocks=5, section=6, across_batch=True)
    for n in range(0, order.tiles, 3):
        (first, *others) = [order.work(jnp.int32(n + m)) for m in range(3)]
        assert all((int(x.h), int(x.block)) == (int(first.h), int(first.block)) for x in others)
        assert [int(x.b) for x in (first, *others)] == [0, 1, 2]

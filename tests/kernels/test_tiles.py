"""Rules that a tile must keep and no compiler checks."""

import pytest

from pallas_kernels import l1_tiles, linear_tiles, masked_tiles, tiles

TABLES = [
    value
    for module in (tiles, l1_tiles, linear_tiles, masked_tiles)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, dict)
]
TILES = {tile for table in TABLES for tile in table.values() if hasattr(tile, "registers")}


@pytest.mark.parametrize("tile", sorted(TILES, key=str), ids=str)
def test_registers_are_those_of_the_launch(tile):
    """Warpgroups trade what the CTA was launched with; one that asks for more waits for ever."""
    consumers = getattr(tile, "warpgroups", 2)
    warpgroups = consumers + 1
    launched = min(255, 2**16 // (128 * warpgroups)) // 8 * 8  # of each thread, in eights
    assert consumers * tile.registers + tile.producer_registers <= warpgroups * launched
    assert tile.registers % 8 == tile.producer_registers % 8 == 0


def test_all_tables_are_found():
    assert len(TABLES) == 8 + 5 + 1 + 3
    assert len(TILES) > 15

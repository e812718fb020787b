"""Tiles so small that short sequences cross their borders."""

import math

import jax
import pytest

from jflash.xla import l1_distances, l1_pairwise, l1_sparse, tiles


@pytest.fixture(scope="module")
def small_tiles():
    """Tiles of 32 queries by 32 keys (16 backward); features, rows and pairs by the handful."""

    def choose(p, block_q, block_k):
        bq, bk = block_q // 16, block_k // 16
        return tiles.Tile(1, math.gcd(p.Hk, 2), bq, bk, math.ceil(p.Sq / bq), math.ceil(p.Sk / bk))

    jax.clear_caches()  # a tile is no part of the key under which JAX keeps what it has traced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "choose", choose)
        patch.setattr(l1_distances, "_CHUNK", 4)
        patch.setattr(l1_pairwise, "_BLOCK", 32)
        patch.setattr(l1_sparse, "_SPREAD", 2**12)
        yield
    jax.clear_caches()

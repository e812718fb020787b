"""vmap of calls on caches is one call with the batch of all: also where the caches have pages, of each or of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention_with_kvcache
from tests.parity.cases import normal

N, B, H, PAGE, PAGES = 3, 2, 4, 8, 5  # examples, and of each the entries, heads, keys in a page, pages of the cache
TABLE = np.array([[[4, 0], [2, -7]], [[1, 3], [0, 2]], [[0, 1], [3, 99]]], np.int32)
LENGTHS = np.array([[9, 3], [16, 0], [11, 8]], np.int32)


def attend(q, k, v, lengths, table, sinks):
    return flash_attention_with_kvcache(
        q, k, v, cache_seqlens=lengths, block_table=table, sinks=sinks, causal=True, return_lse=True
    )


@pytest.mark.parametrize("mapped", ["all", "queries", "keys", "no_pages"])
def test_is_each_call(mapped):
    pages, table, own = PAGES, TABLE, {"all": (0, 0, 0), "queries": (None, None, 0), "keys": (0, None, None)}
    if mapped == "no_pages":
        pages, table, own[mapped] = B, None, (0, 0, None)
    k, v, of_table = own[mapped]
    arrays = [
        normal(0, N, B, 2, H, 16),
        normal(1, *(() if k is None else (N,)), pages, 2 * PAGE if table is None else PAGE, 2, 16),
        normal(2, *(() if v is None else (N,)), pages, 2 * PAGE if table is None else PAGE, 2, 16),
        LENGTHS,
        table if of_table == 0 or table is None else TABLE[1],
        normal(3, N, H),
    ]
    axes = (0, k, v, 0, of_table, 0)
    out, _, _, lse = jax.vmap(attend, axes)(*arrays)
    for n in range(N):
        each = attend(*(x if axis is None else x[n] for x, axis in zip(arrays, axes, strict=True)))
        np.testing.assert_allclose(out[n], each[0], atol=2e-6)
        np.testing.assert_allclose(lse[n], each[3], atol=2e-6)
    assert jnp.isfinite(out).all()

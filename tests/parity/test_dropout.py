"""The dropout mask: what it depends on, how it is distributed, and that backends agree on it.

With q = 0 every weight is 1 / Sk, and with v the identity the weights themselves come out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention
from tests.parity.cases import normal

KEY = jax.random.key(7)


@functools.partial(jax.jit, static_argnames=("B", "Sq", "Sk", "H", "Hk", "rate", "implementation"))
def weights(key, *, B=2, Sq=70, Sk=100, H=4, Hk=2, rate=0.4, implementation="xla"):
    """Sk times the dropped weights [B, H, Sq, Sk]: 0, or 1 / (1 - rate)."""
    q, k = jnp.zeros((B, Sq, H, 8)), jnp.zeros((B, Sk, Hk, 8))
    v = jnp.broadcast_to(jnp.eye(Sk)[:, None], (B, Sk, Hk, Sk))
    out = flash_attention(q, k, v, dropout_rate=rate, dropout_key=key, implementation=implementation)
    return jnp.moveaxis(out, 2, 1) * Sk


def kept(key, **shape) -> np.ndarray:
    return np.asarray(weights(key, **shape) > 0)


def test_what_is_kept_is_scaled():
    found = np.unique(np.round(weights(KEY), 4))
    np.testing.assert_allclose(found, [0, 1 / 0.6], rtol=1e-4)


def test_backends_agree():
    assert np.array_equal(kept(KEY), kept(KEY, implementation="reference"))


def test_tiles_do_not_enter(request):
    large = kept(KEY)
    request.getfixturevalue("small_tiles")
    assert np.array_equal(large, kept(KEY))


@pytest.mark.parametrize("smaller", [{"B": 1}, {"Sq": 33}, {"Sk": 64}, {"H": 2}, {"Hk": 4}, {"Hk": 1}], ids=str)
def test_it_depends_on_the_position_alone(smaller):
    """A smaller problem has a part of the larger problem's mask; grouping of heads does not enter."""
    found = kept(KEY, **smaller)
    B, H, Sq, Sk = found.shape
    assert np.array_equal(found, kept(KEY)[:B, :H, :Sq, :Sk])


def test_it_depends_on_the_key():
    first, again, other = kept(KEY), kept(jax.random.key(7)), kept(jax.random.key(8))
    assert np.array_equal(first, again)
    assert abs(np.mean(first == other) - (0.4**2 + 0.6**2)) < five_sigma(first.size)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 0.9, 0.999])
def test_rate(rate):
    assert abs(np.mean(kept(KEY, rate=rate)) - (1 - rate)) < five_sigma(2 * 4 * 70 * 100, rate)


@pytest.mark.parametrize("axis", range(4), ids=["batch", "heads", "queries", "keys"])
def test_neighbours_are_independent(axis):
    """Neither one place along an axis nor any other lag correlates."""
    x = kept(KEY).astype(np.float64) - 0.6
    for lag in range(1, min(x.shape[axis], 33)):
        near = x.take(range(lag, x.shape[axis]), axis) * x.take(range(x.shape[axis] - lag), axis)
        assert abs(near.mean()) < five_sigma(near.size, 0.4) * (0.4 * 0.6) ** 0.5, lag


def test_rows_and_columns_have_the_rate():
    """No row, column or head is dropped more than chance allows (5 sigma of some 500 sums)."""
    x = kept(KEY)
    for axes in ((0, 1, 2), (0, 1, 3), (2, 3)):
        share = x.mean(axis=axes)
        assert np.abs(share - 0.6).max() < five_sigma(x.size // share.size)


def test_expectation_is_no_dropout():
    """The mean over 256 keys, beside the spread of that mean."""
    q, k, v = (normal(seed, 1, 40, 2, 16) for seed in range(3))
    one = functools.partial(flash_attention, q, k, v, causal=True, implementation="xla")
    keys = jax.random.split(KEY, 256)
    found = np.asarray(jax.jit(jax.vmap(lambda key: one(dropout_rate=0.3, dropout_key=key)))(keys))
    spread = found.std(axis=0) / len(keys) ** 0.5
    z = (found.mean(axis=0) - one()) / np.maximum(spread, 1e-6)
    assert np.abs(z).max() < 5
    assert 0.9 < np.square(z[:, 5:]).mean() < 1.1


def test_lse_is_of_the_undropped_softmax():
    q, k, v = (normal(seed, 1, 40, 2, 16) for seed in range(3))
    _, with_dropout = flash_attention(q, k, v, dropout_rate=0.5, dropout_key=KEY, return_lse=True)
    _, without = flash_attention(q, k, v, return_lse=True)
    assert jnp.array_equal(with_dropout, without)


def test_rate_zero_needs_and_uses_no_key():
    q, k, v = (normal(seed, 1, 40, 2, 16) for seed in range(3))
    assert jnp.array_equal(flash_attention(q, k, v, dropout_rate=0.0, dropout_key=KEY), flash_attention(q, k, v))


def five_sigma(count: int, rate: float = 0.4) -> float:
    """Of the mean of that many independent draws."""
    return 5 * (rate * (1 - rate) / count) ** 0.5

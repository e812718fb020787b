"""Decays near both ends: what forgets all at once, what never forgets, and the two side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import linear_attention
from jflash.xla import linear_decay
from tests.linear.rule import assert_matches_oracle, everything, inputs


def log_decays(kind: str, B=2, S=50, H=2) -> jax.Array:
    g = -np.abs(np.random.default_rng(1).normal(size=(B, S, H)))
    spikes = (np.arange(S) % 7 == 3)[:, None]
    return jnp.asarray({"strong": 20 * g, "huge": 1e4 * g, "weak": 1e-3 * g}.get(kind, np.where(spikes, -1e6, g / 50)))


KINDS = ("strong", "huge", "weak", "weak beside huge")


@pytest.mark.parametrize(("kind", "reverse"), [*((kind, False) for kind in KINDS), ("strong", True), (KINDS[-1], True)])
def test_each_token(kind, reverse):
    arrays = inputs(state=True) | {"log_decay": log_decays(kind)}
    assert_matches_oracle(arrays, reverse=reverse, chunk_size=32)


@pytest.mark.parametrize("g", [(-1e5, -1e-6), (-30.0, 0.0)], ids=str)
def test_each_head(g):
    assert_matches_oracle(inputs(state=True) | {"log_decay": jnp.asarray(g)}, chunk_size=32)


def test_zero_log_decay_is_no_decay():
    arrays = inputs(state=True)
    plain = everything(linear_attention, arrays, implementation="xla", chunk_size=16)
    zero = everything(linear_attention, arrays | {"log_decay": jnp.zeros(2)}, implementation="xla", chunk_size=16)
    for name, x in plain.items():
        np.testing.assert_allclose(zero[name], x, rtol=1e-5, atol=1e-5)


def test_minus_infinity_forgets_all():
    """A sequence after a reset is a sequence of its own, and no gradient is NaN."""
    g = log_decays("weak").at[:, 20].set(-jnp.inf)
    arrays = inputs(state=True) | {"log_decay": g}
    assert_matches_oracle(arrays, chunk_size=16)
    q, k, v = (arrays[name][:, 20:] for name in "qkv")
    out = linear_attention(**arrays, implementation="xla", chunk_size=16)
    tail = linear_attention(q, k, v, log_decay=g[:, 20:].at[:, 0].set(0.0), implementation="xla", chunk_size=16)
    np.testing.assert_allclose(out[:, 20:], tail, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [16, 64])
def test_sums_between_tokens(size):
    g = np.asarray(log_decays("weak beside huge", S=size)[0, :, 0], np.float64)
    sums = np.asarray(linear_decay.between(jnp.asarray(g, jnp.float32)))
    for i in range(size):
        for j in range(size):
            assert sums[i, j] == (-np.inf if i < j else pytest.approx(g[j + 1 : i + 1].sum(), rel=1e-6, abs=1e-12))

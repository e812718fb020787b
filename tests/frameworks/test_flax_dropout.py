"""Dropout of `jflash.flax.attention_fn`: whose weights are dropped, and what the rest becomes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import linen

from jflash.flax import attention_fn, make_attention_fn
from tests.frameworks.rule import assert_same_function, random

B, Sq, Sk, H, D, RATE = 3, 29, 41, 4, 16, 0.25


def kept(key, broadcast: bool, batch=(B,)) -> np.ndarray:
    """Which weights survive, [batch..., H, Sq, Sk]: times the identity, uniform weights come out bare."""
    zeros = jnp.zeros((*batch, Sq, H, D)), jnp.zeros((*batch, Sk, H, D))
    identity = jnp.broadcast_to(jnp.eye(Sk)[:, None], (*batch, Sk, H, Sk))
    attend = make_attention_fn(implementation="reference")
    out = attend(*zeros, identity, dropout_rng=key, dropout_rate=RATE, broadcast_dropout=broadcast)
    weights = np.moveaxis(np.asarray(out), -2, -3)
    assert np.allclose(weights[weights != 0], 1 / Sk / (1 - RATE), rtol=1e-5)
    return weights != 0


def operands(Hk=H, **more) -> dict:
    return {
        "query": random(1, B, Sq, H, D),
        "key": random(2, B, Sk, Hk, D),
        "value": random(3, B, Sk, Hk, D),
        **more,
    }


def flax_with(pattern, options=None):
    """Flax's attention with its weights dropped by a given pattern instead of its own."""

    def attend(x):
        bias, (query, key, value) = x.get("bias"), (x[name] for name in ("query", "key", "value"))
        key, value = (jnp.repeat(y, H // key.shape[-2], axis=-2) for y in (key, value))
        weights = linen.dot_product_attention_weights(query, key, bias, **(options or {}))
        return jnp.einsum("...hqk,...khd->...qhd", weights * (pattern / (1 - RATE)), value)

    return attend


def test_broadcast_dropout_shares_one_mask_and_its_absence_draws_one_each():
    shared = kept(jax.random.key(7), broadcast=True)
    assert np.array_equal(shared, np.broadcast_to(shared[:1, :1], shared.shape))
    each = kept(jax.random.key(7), broadcast=False).reshape(B * H, -1)
    agreement = np.array([[np.mean(x == y) for y in each] for x in each])
    expected = RATE**2 + (1 - RATE) ** 2
    assert np.abs(agreement[~np.eye(B * H, dtype=bool)] - expected).max() < 0.08
    for mask in (shared[0, 0], each):
        deviation = np.sqrt(RATE * (1 - RATE) / mask.size)
        assert abs(mask.mean() - (1 - RATE)) < 5 * deviation


def test_the_mask_depends_on_the_key_alone():
    typed = kept(jax.random.key(7), broadcast=True)
    assert np.array_equal(typed, kept(jax.random.PRNGKey(7), broadcast=True))
    assert np.array_equal(typed[0], kept(jax.random.key(7), broadcast=True, batch=())), "other batch sizes"
    assert np.mean(typed[0, 0] != kept(jax.random.key(8), broadcast=True)[0, 0]) > 0.2


@pytest.mark.parametrize("broadcast", [True, False])
def test_what_is_kept_equals_flax_and_so_do_gradients(broadcast):
    key = jax.random.key(3)
    mask = np.random.default_rng(5).random((B, 1, 1, Sk)) > 0.3
    arrays = operands(Hk=2, bias=random(4, 1, H, Sq, Sk))
    ours = {"mask": mask, "dropout_rng": key, "dropout_rate": RATE, "broadcast_dropout": broadcast}
    theirs = flax_with(kept(key, broadcast), {"mask": mask})
    attend = make_attention_fn(implementation="reference")
    assert_same_function(theirs, lambda x: attend(**x, **ours), arrays)


def test_a_shared_mask_goes_with_every_option():
    """Each batch entry and head gets its own options, as the weights without dropout show."""
    key, ids = jax.random.key(3), np.sort(np.random.default_rng(1).integers(0, 3, (B, Sk)))
    attend = make_attention_fn(
        segment_ids=(ids[:, -Sq:], ids),
        sinks=random(6, B, H),
        alibi_slopes=jnp.linspace(0.1, 0.5, H),
        softcap=2.0,
    )
    x = operands() | {
        "value": jnp.broadcast_to(jnp.eye(Sk)[:, None], (B, Sk, H, Sk)),
        "bias": random(4, B, 1, Sq, 1),
    }
    dropped = attend(**x, dropout_rng=key, dropout_rate=RATE)
    pattern = np.moveaxis(kept(key, broadcast=True), -2, -3)
    assert np.allclose(dropped, attend(**x) * pattern / (1 - RATE), atol=1e-5)


def test_deterministic_and_rate_zero_drop_nothing():
    x, key = operands(), jax.random.key(0)
    plain = attention_fn(**x)
    assert np.array_equal(plain, attention_fn(**x, dropout_rng=key, dropout_rate=RATE, deterministic=True))
    assert np.array_equal(plain, attention_fn(**x, dropout_rng=key, dropout_rate=0.0))
    assert not np.allclose(plain, attention_fn(**x, dropout_rng=key, dropout_rate=RATE), atol=1e-2)


def test_where_flax_computes_its_own_bits_are_used():
    x = operands()
    options = {"dropout_rng": jax.random.key(0), "dropout_rate": RATE, "precision": "high"}
    assert np.array_equal(attention_fn(**x, **options), linen.dot_product_attention(**x, **options))

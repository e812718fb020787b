"""Feature maps by their formulas, in float64, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import feature_maps, linear_attention

X, Y = np.random.default_rng(0).normal(size=(2, 3, 5))


def test_elu_plus_one():
    found = feature_maps.elu_plus_one(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(found, np.where(X > 0, X + 1, np.exp(X)), rtol=1e-6)
    steep = jax.grad(lambda x: feature_maps.elu_plus_one(x).sum())(jnp.asarray([1e4, 0.0, -1e4]))
    assert steep.tolist() == [1.0, 1.0, 0.0]


def test_taylor():
    x, y = (feature_maps.taylor(jnp.asarray(a, jnp.float32)) for a in (X, Y))
    dot = (X * Y).sum(-1)
    np.testing.assert_allclose((x * y).sum(-1), 1 + dot + dot**2 / 2, rtol=1e-5)
    assert x.shape == (3, 1 + 5 + 15)


def test_dpfp():
    found = feature_maps.dpfp(jnp.asarray(X, jnp.float32), nu=3)
    positive = np.maximum(np.concatenate([X, -X], -1), 0)
    expected = [[positive[..., i] * positive[..., i - shift] for i in range(10)] for shift in (1, 2, 3)]
    np.testing.assert_allclose(found, np.moveaxis(np.concatenate(expected), 0, -1), rtol=1e-6)
    with pytest.raises(ValueError, match=r"nu=10 must be >= 1 and < 2 D=10"):
        feature_maps.dpfp(jnp.asarray(X), nu=10)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda x: jnp.dtype(x).name)
def test_l2_normalize_keeps_float16_in_range(dtype):
    x = jnp.asarray(300 * np.random.default_rng(0).normal(size=(1, 2000, 1, 64)), dtype)
    unit = feature_maps.l2_normalize(x)
    assert unit.dtype == dtype
    np.testing.assert_allclose(jnp.linalg.norm(unit.astype(jnp.float32), axis=-1), 1, rtol=0.01)
    assert jnp.isfinite(linear_attention(unit, unit, unit)).all()


def test_zero_has_a_gradient():
    assert jnp.isfinite(jax.grad(lambda x: feature_maps.l2_normalize(x).sum())(jnp.zeros(4))).all()


def test_normalized_attention_averages_values():
    """With positive features the weights of a row sum to 1, so a constant value comes back."""
    q, k = (feature_maps.elu_plus_one(jax.random.normal(jax.random.key(n), (1, 40, 2, 8))) for n in range(2))
    out = linear_attention(q, k, jnp.full((1, 40, 2, 3), 2.5), normalize=True)
    np.testing.assert_allclose(out, 2.5, rtol=1e-5)

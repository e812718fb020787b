"""Masked linear attention in tiles, every output and gradient, the mask's too, against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import linear_attention
from jflash.xla import linear_masked
from tests.linear.rule import assert_matches_oracle, inputs

B, H, S, SK = 2, 3, 45, 37


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles small enough that these lengths need several, the last one ragged."""
    monkeypatch.setattr(linear_masked, "BLOCK", 16)
    jax.clear_caches()
    yield
    jax.clear_caches()


MASKS = [
    (B, H, S, SK),
    (B, 1, S, SK),
    (1, H, S, SK),
    (1, 1, S, SK),
    (1, H, 1, SK),
    (B, 1, S, 1),
    (B, H, 1, 1),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_mask_broadcasts_over_any_axis(mask):
    assert_matches_oracle(inputs(B=B, S=S, Sk=SK, Hq=H, mask=mask))


def test_boolean_mask():
    arrays = inputs(B=B, S=S, Sk=SK, Hq=H)
    arrays["mask"] = jnp.asarray(np.random.default_rng(1).random((B, 1, S, SK)) < 0.6)
    assert_matches_oracle(arrays)


def test_normalized():
    arrays = inputs(B=B, S=S, Sk=SK, Hq=H, mask=(B, H, S, SK), positive=True)
    arrays["mask"] = jnp.abs(arrays["mask"])
    assert_matches_oracle(arrays, normalize=True)


def test_row_without_weight_is_zero():
    arrays = inputs(B=1, S=S, Sk=SK, Hq=1, mask=(1, 1, S, SK), positive=True)
    arrays["mask"] = jnp.abs(arrays["mask"]).at[:, :, 5].set(0.0)
    assert_matches_oracle(arrays, normalize=True)
    assert not linear_attention(**arrays, normalize=True)[:, 5].any()


@pytest.mark.parametrize(
    "heads", [{"Hq": 4, "Hk": 2}, {"Hq": 4, "Hk": 1, "Hv": 4}, {"Hq": 2, "Hk": 2, "Hv": 4}], ids=str
)
def test_heads_are_shared(heads):
    assert_matches_oracle(inputs(B=B, S=S, Sk=SK, Dv=5, mask=(1, 4, S, SK), **heads))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64], ids=lambda x: jnp.dtype(x).name)
def test_dtypes(dtype):
    assert_matches_oracle(inputs(dtype=dtype, B=B, S=S, Sk=SK, Hq=H, mask=(B, 1, S, SK)))


@pytest.mark.parametrize("mask", [(1, 4, 1, SK), (B, 1, S, 1)], ids=str)
def test_mask_of_one_row_or_column_in_bfloat16(mask):
    arrays = inputs(dtype=jnp.bfloat16, B=B, S=S, Sk=SK, Hq=4, Hk=2, Dv=5, mask=mask)
    assert_matches_oracle(arrays)
    assert_matches_oracle(arrays | {"mask": arrays["mask"] > 0})


def test_mask_of_another_dtype():
    arrays = inputs(dtype=jnp.bfloat16, B=B, S=S, Sk=SK, Hq=H, mask=(1, 1, S, SK))
    arrays["mask"] = arrays["mask"].astype(jnp.float32)
    assert_matches_oracle(arrays)


@pytest.mark.parametrize(("lengths"), [(16, 16), (1, 40), (40, 1)], ids=str)
def test_lengths(lengths):
    i, j = lengths
    assert_matches_oracle(inputs(B=1, S=i, Sk=j, Hq=1, mask=(1, 1, i, j)))

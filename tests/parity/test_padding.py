"""What is hidden does not count, and what is not a number goes no further than in the oracle.

A hidden weight is exactly 0, so a hidden key or value of any finite size changes no bit. 0 times NaN is NaN,
in the oracle as everywhere: a NaN or infinite *value* must be removed by its owner, hidden or not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention
from tests.oracle import assert_matches_oracle, inputs
from tests.parity.cases import booleans, normal, outputs_and_gradients

B, SQ, SK, H = 2, 40, 70, 2
ONE = {"B": B, "Sq": SQ, "Sk": SK, "H": H, "D": 16}
LAST = jnp.arange(SK) >= 50  # keys of padding
HOW = {
    "mask": ({"mask": jnp.broadcast_to(~LAST, (1, 1, 1, SK))}, LAST),
    "bias": ({"bias": jnp.where(LAST, -jnp.inf, 0.0).reshape(1, 1, 1, SK)}, LAST),
    "segment_ids": ({"segment_ids": (jnp.zeros((B, SQ), int), jnp.tile(1 * LAST, (B, 1)))}, LAST),
    "window": ({"window": (9, 5)}, jnp.arange(SK) < SK - SQ - 9),
}

pytestmark = pytest.mark.usefixtures("small_tiles")


def run(implementation="xla", **options):
    """The function from arrays, and cotangents, to a dict of out, lse and gradients."""
    attend = functools.partial(flash_attention, **options, return_lse=True, implementation=implementation)
    compiled = outputs_and_gradients(lambda arrays: attend(**arrays))

    def named(arrays, cotangents=None):
        (out, lse), grads = compiled(arrays, cotangents)
        return {"out": out, "lse": lse, **{f"d{name}": g for name, g in grads.items()}}

    return named


def poisoned(arrays, where, value, names="kv"):
    return arrays | {name: jnp.where(where[:, None, None], value, arrays[name]) for name in names}


@pytest.mark.parametrize("how", HOW)
def test_hidden_keys_change_no_bit(how):
    options, hidden = HOW[how]
    arrays = inputs(0, jnp.float32, **ONE)
    clean, dirty = map(run(**options), (arrays, poisoned(arrays, hidden, 1e30)))
    for name, x in clean.items():
        assert jnp.array_equal(x, dirty[name]), name
    for name in ("dk", "dv"):
        assert (dirty[name][:, hidden] == 0).all()
        assert (dirty[name][:, ~hidden] != 0).any()


@pytest.mark.parametrize("window", [(None, 0), (3, 6)], ids=str)
def test_keys_ahead_change_no_bit_of_a_query(window):
    arrays = inputs(1, jnp.float32, **ONE)
    query = 17
    ahead = jnp.arange(SK) > query + SK - SQ + window[1]
    clean, dirty = map(run(window=window), (arrays, poisoned(arrays, ahead, 1e30)))
    assert jnp.array_equal(clean["out"][:, : query + 1], dirty["out"][:, : query + 1])
    assert jnp.array_equal(clean["lse"][:, :, : query + 1], dirty["lse"][:, :, : query + 1])
    assert not jnp.array_equal(clean["out"][:, query + 1], dirty["out"][:, query + 1])


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("how", ["mask", "segment_ids", "window"])
def test_hidden_keys_may_be_anything_in_the_forward(how, value):
    options, hidden = HOW[how]
    arrays = inputs(2, jnp.float32, **ONE)
    attend = jax.jit(functools.partial(flash_attention, **options, return_lse=True, implementation="xla"))
    clean, dirty = (attend(**a) for a in (arrays, poisoned(arrays, hidden, value, "k")))
    for x, y in zip(clean, dirty, strict=True):
        assert jnp.array_equal(x, y)


@pytest.mark.parametrize("poison", ["hidden keys", "hidden values", "a query"])
@pytest.mark.parametrize("how", ["mask", "window"])
def test_nan_goes_no_further_than_in_the_oracle(how, poison):
    options, hidden = HOW[how]
    where = jnp.arange(SQ) == 11 if poison == "a query" else hidden
    name = {"hidden keys": "k", "hidden values": "v", "a query": "q"}[poison]
    arrays = poisoned(inputs(3, jnp.float32, **ONE), where, jnp.nan, name)
    ours, oracle = (run(name, **options)(arrays) for name in ("xla", "reference"))
    assert not jnp.isfinite(oracle["dq"]).all()
    for name in ("out", "lse") if poison == "hidden values" else ours:
        assert (jnp.isfinite(ours[name]) | ~jnp.isfinite(oracle[name])).all(), name


def test_a_visible_nan_shows():
    """In out and lse of every query that sees its key, and in no other row."""
    arrays = poisoned(inputs(4, jnp.float32, **ONE), jnp.arange(SK) == 60, jnp.nan, "k")
    found = run(causal=True)(arrays)
    sees = np.arange(SQ) + SK - SQ >= 60
    for name, axes in (("out", (0, 2, 3)), ("lse", (0, 1))):
        assert np.array_equal(np.isnan(found[name]).all(axes), sees), name
        assert np.array_equal(np.isnan(found[name]).any(axes), sees), name


def test_a_row_without_keys_ignores_the_cotangent_of_its_lse():
    """Merging parts through lse makes NaN of -inf less -inf."""
    arrays = inputs(6, jnp.float32, **ONE)
    mask = booleans(7, B, 1, SQ, 1)
    d_lse = jnp.where(mask[..., 0], normal(8, B, H, SQ), jnp.nan)
    for implementation in ("xla", "reference"):
        found = run(implementation, mask=mask)(arrays, (normal(9, B, SQ, H, 16), d_lse))
        assert all(jnp.isfinite(found[name]).all() for name in ("dq", "dk", "dv")), implementation
        assert (found["dq"][~mask[:, 0, :, 0]] == 0).all()


def test_a_sink_of_minus_infinity_is_no_sink():
    arrays = inputs(10, jnp.float32, **ONE)
    mask = booleans(11, B, 1, SQ, 1)
    none = run(mask=mask)(arrays)
    found = run(mask=mask)(arrays | {"sinks": jnp.full(H, -jnp.inf)})
    assert (found.pop("dsinks") == 0).all()
    for name, x in found.items():
        np.testing.assert_allclose(x, none[name], atol=5e-6, err_msg=name)


def test_large_scores():
    """exp of scores of some 500 overflows, the softmax does not."""
    arrays = inputs(12, jnp.float32, **ONE)
    assert_matches_oracle(arrays | {"bias": 500 * normal(13, 1, H, 1, SK)}, {}, "xla")

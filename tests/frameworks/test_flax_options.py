"""`jflash.flax.make_attention_fn`: each option beside Flax's own attention made to do the same in O(N^2)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import linen

from jflash.flax import make_attention_fn
from tests.frameworks.rule import assert_same_function, random

B, Sq, Sk, H, D = 2, 37, 53, 4, 16
distance = (jnp.arange(Sq)[:, None] + Sk - Sq) - jnp.arange(Sk)  # from a key to a query at the end of the keys
slopes = np.asarray([0.5, 0.25, 0.125, 0.0625], np.float32)
ids = np.sort(np.random.default_rng(1).integers(0, 3, (B, Sk)))
visible = np.random.default_rng(5).random((B, 1, 1, Sk)) > 0.3


def operands(Sq=Sq, batch=(B,), **more) -> dict:
    shapes = {"query": (*batch, Sq, H, D), "key": (*batch, Sk, H, D), "value": (*batch, Sk, H, D)}
    return {name: random(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())} | more


def capped(spec, query, key, cap=1.5):
    """The einsum of the scores with a soft cap behind it."""
    return cap * jnp.tanh(jnp.einsum(spec, query, key) / cap)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        pytest.param({"window": (9, 4)}, {"mask": (distance <= 9) & (distance >= -4)}, id="window"),
        pytest.param({"causal": True, "window": (9, None)}, {"mask": (distance <= 9) & (distance >= 0)}, id="both"),
        pytest.param(
            {"segment_ids": (ids[:, -Sq:], ids)},
            {"mask": (ids[:, None, -Sq:, None] == ids[:, None, None, :])},
            id="segment_ids",
        ),
        pytest.param({"alibi_slopes": slopes}, {"bias": -slopes[:, None, None] * np.abs(distance)}, id="alibi_slopes"),
        pytest.param(
            {"softcap": 1.5},
            {"qk_attn_weights_einsum": capped, "attn_weights_value_einsum": jnp.einsum},
            id="softcap",
        ),
    ],
)
def test_equals_flax(options, theirs):
    mask = visible & theirs.get("mask", True)
    theirs = functools.partial(linen.dot_product_attention, **theirs | {"mask": mask})
    ours = functools.partial(make_attention_fn(**options, implementation="reference"), mask=visible.astype(np.float32))
    assert_same_function(lambda x: theirs(**x), lambda x: ours(**x), operands())


def test_scale_equals_flax_on_scaled_queries():
    ours = make_attention_fn(scale=0.7, implementation="reference")
    theirs = linen.dot_product_attention
    scaled = lambda x: x | {"query": x["query"] * (0.7 * D**0.5)}  # noqa: E731
    assert_same_function(lambda x: theirs(**scaled(x)), lambda x: ours(**x), operands())


def test_sinks_equal_a_key_of_value_zero_with_the_sink_as_its_bias():
    def theirs(x):
        key, value = (jnp.pad(x[name], ((0, 0), (0, 1), (0, 0), (0, 0))) for name in ("key", "value"))
        bias = jnp.broadcast_to(x["sinks"][..., None, None], (B, H, Sq, 1))
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (Sk, 0)))
        return linen.dot_product_attention(x["query"], key, value, bias)

    def ours(x):
        attend = make_attention_fn(sinks=x["sinks"], implementation="reference")
        return attend(x["query"], x["key"], x["value"])

    assert_same_function(theirs, ours, operands(sinks=random(6, B, H)))


def test_options_may_have_every_batch_axis_of_flax():
    x, sinks, ids = (
        operands(batch=(2, 3)),
        random(6, 2, 3, H),
        np.random.default_rng(1).integers(0, 3, (2, 3, Sk)),
    )
    out = make_attention_fn(sinks=sinks, segment_ids=(ids[..., :Sq], ids))(**x)
    for b in range(2):
        one = make_attention_fn(sinks=sinks[b], segment_ids=(ids[b, :, :Sq], ids[b]))
        assert np.allclose(out[b], one(**{name: y[b] for name, y in x.items()}), atol=1e-6)


@pytest.mark.parametrize("options", [{"window": (6, 0)}, {"causal": True, "window": (6, None)}])
def test_a_lone_query_stands_at_its_last_visible_key(options):
    """In a decode cache the keys behind the mask are not written yet, so positions must not count them."""
    x, current = operands(Sq=1), np.asarray([30, 3])[:, None, None, None]
    j = np.arange(Sk)
    cache = (j <= current).astype(np.float32)
    seen = cache * (j >= current - 6)
    out = make_attention_fn(**options)(**x, mask=cache)
    assert np.allclose(out, linen.dot_product_attention(**x, mask=seen), atol=1e-5)


@pytest.mark.parametrize("option", [{"causal": True}, {"window": (3, 3)}, {"alibi_slopes": slopes}])
def test_is_causal_is_refused_where_positions_would_be_ambiguous(option):
    attend = make_attention_fn(**option)
    with pytest.raises(NotImplementedError, match=f"Sq=37 must equal Sk=53 .* {next(iter(option))}="):
        attend(**operands(), is_causal=True)
    square = operands(Sq=Sk)
    mask = np.tril(np.ones((Sk, Sk)))
    assert np.allclose(attend(**square, is_causal=True), attend(**square, mask=mask), atol=1e-5)


def test_is_causal_hides_keys_with_their_segments():
    attend = make_attention_fn(segment_ids=(ids[:, :Sq], ids))
    mask = np.tril(np.ones((Sq, Sk)))
    x = operands()
    assert np.allclose(attend(**x, is_causal=True), attend(**x, mask=mask), atol=1e-5)


def test_alibi_with_sinks_is_refused_for_a_lone_masked_query():
    attend = make_attention_fn(alibi_slopes=slopes, sinks=random(6, H))
    with pytest.raises(NotImplementedError, match="position of a lone masked query"):
        attend(**operands(Sq=1), mask=visible)
    assert attend(**operands(Sq=1)).shape == (B, 1, H, D)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation='fast' must be None or one of"):
        make_attention_fn(implementation="fast")(**operands())

"""Whole modules of flax.linen and flax.nnx with `attention_fn=`, beside the same modules with Flax's own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import linen, nnx

import jflash.flax
from tests.frameworks.rule import assert_as_accurate, assert_same_function, random

B, S, FEATURES, HEADS = 2, 23, 32, 4
causal = np.tril(np.ones((1, 1, S, S), np.float32))
padding = (np.arange(S) < np.array([17, S])[:, None])[:, None, None].astype(np.float32)
reference = jflash.flax.make_attention_fn(implementation="reference")


def linen_module(attention_fn=linen.dot_product_attention, **options):
    return linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, **options)


@functools.cache
def linen_variables(**options):
    return jax.jit(linen_module(**options).init)(jax.random.key(0), random(0, B, S, FEATURES))


def nnx_module(attention_fn=nnx.dot_product_attention, **options):
    options = {"decode": False, "attention_fn": attention_fn} | options
    return nnx.MultiHeadAttention(HEADS, FEATURES, **options, rngs=nnx.Rngs(0))


def nnx_exact(*args, **options):
    """nnx's own attention past its shortcut, whose softmax is in float32 whatever the dtype."""
    return nnx.dot_product_attention(*args, **options | {"dropout_rate": 0.5})


def nnx_apply(module, **options):
    """(parameters, the module as a function of parameters and input)."""
    graph, parameters = nnx.split(module)
    return parameters, lambda x: nnx.merge(graph, x["params"])(x["x"], **options)


def in_bfloat16(arrays):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arrays)


@pytest.mark.parametrize("mask", [causal * padding, padding], ids=["causal_padding", "padding"])
def test_linen_module_and_its_parameters_gradients(mask):
    theirs, ours = (linen_module(f).apply for f in (linen.dot_product_attention, reference))
    arrays = {"params": linen_variables(), "x": random(1, B, S, FEATURES)}
    assert_same_function(
        lambda x: theirs(x["params"], x["x"], mask=mask),
        lambda x: ours(x["params"], x["x"], mask=mask),
        arrays,
    )


def test_linen_module_in_bfloat16():
    """Without biases: that of the keys cancels in the softmax, so that its gradient is all rounding."""

    def apply(**options):
        module = linen_module(use_bias=False, **options)
        return lambda x: module.apply(x["params"], x["x"], mask=causal)

    arrays = in_bfloat16({"params": linen_variables(use_bias=False), "x": random(1, B, S, FEATURES)})
    ours = apply(attention_fn=jflash.flax.attention_fn)
    assert_as_accurate(apply(), ours, arrays, low=apply(force_fp32_for_softmax=True))


def test_linen_module_with_two_batch_axes_and_a_made_attention_fn():
    """linen filters what it passes by signature: the mask must reach a made attention_fn too."""
    x, mask = random(1, 3, B, S, FEATURES), padding[None]
    ours = linen_module(jflash.flax.make_attention_fn(causal=True)).apply(linen_variables(), x, mask=mask)
    assert np.allclose(ours, linen_module().apply(linen_variables(), x, mask=mask * causal), atol=1e-5)


@pytest.mark.parametrize("Hk", [HEADS, 2])
def test_nnx_module_and_its_parameters_gradients(Hk):
    parameters, theirs = nnx_apply(nnx_module(nnx_exact, num_kv_heads=Hk), mask=causal * padding)
    _, ours = nnx_apply(nnx_module(reference, num_kv_heads=Hk), mask=padding, is_causal=True)
    assert_same_function(theirs, ours, {"params": parameters, "x": random(1, B, S, FEATURES)})


def test_nnx_module_in_bfloat16():
    options = {"num_kv_heads": 2, "use_bias": False}
    parameters, theirs = nnx_apply(nnx_module(nnx_exact, **options), is_causal=True)
    _, low = nnx_apply(nnx_module(**options), is_causal=True)
    _, ours = nnx_apply(nnx_module(jflash.flax.attention_fn, **options), is_causal=True)
    assert_as_accurate(theirs, ours, in_bfloat16({"params": parameters, "x": random(1, B, S, FEATURES)}), low=low)


def test_linen_decode_gives_what_the_whole_sequence_gives():
    whole = linen_module().apply(linen_variables(), random(1, B, S, FEATURES), mask=causal)
    module = linen_module(jflash.flax.attention_fn, decode=True)
    variables = dict(linen_variables())
    variables["cache"] = module.init(jax.random.key(0), jnp.zeros((B, S, FEATURES)))["cache"]
    assert variables["cache"]["cached_key"].shape == (B, S, HEADS, FEATURES // HEADS)
    step = jax.jit(functools.partial(module.apply, mutable=["cache"]))
    for i in range(S):
        out, changed = step(variables, random(1, B, S, FEATURES)[:, i : i + 1])
        variables |= changed
        assert np.allclose(out[:, 0], whole[:, i], atol=1e-5), i


@pytest.mark.parametrize("left", [None, 5])
def test_nnx_decode_gives_what_the_whole_sequence_gives(left):
    """With grouped heads, and with a window, whose place in the cache moves with every token."""
    x = random(1, B, S, FEATURES)
    attend = jflash.flax.make_attention_fn(causal=True, window=(left, 0))
    near = np.triu(np.ones((S, S)), -5) if left else 1
    whole = nnx_module(num_kv_heads=2)(x, mask=causal * near)
    module = nnx_module(attend, num_kv_heads=2, decode=True)
    module.init_cache(x.shape)
    step = nnx.jit(lambda module, x: module(x))
    for i in range(S):
        assert np.allclose(step(module, x[:, i : i + 1])[:, 0], whole[:, i], atol=1e-5), i


def test_linen_sows_weights():
    x = random(1, B, S, FEATURES)
    found = []
    for attention_fn in (linen.dot_product_attention, jflash.flax.attention_fn):
        module = linen_module(attention_fn)
        out, state = module.apply(linen_variables(), x, mask=padding, sow_weights=True, mutable=["intermediates"])
        found.append((out, *state["intermediates"]["attention_weights"]))
    assert found[1][1].shape == (B, HEADS, S, S)
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("Hk", [HEADS, 2])
def test_nnx_sows_weights(Hk):
    found = []
    for attention_fn in (nnx.dot_product_attention, jflash.flax.attention_fn):
        module = nnx_module(attention_fn, num_kv_heads=Hk)
        out = module(random(1, B, S, FEATURES), mask=padding, sow_weights=True)
        found.append((out, *nnx.pop(module, nnx.Intermediate)["attention_weights"].get_value()))
    assert found[1][1].shape == (B, HEADS, S, S)
    for theirs, ours in zip(*found, strict=True):
        assert np.allclose(theirs, ours, atol=1e-6)


def test_linen_module_with_einsum_overrides():
    x = random(1, B, S, FEATURES)
    doubled = lambda: lambda *a, **kw: 2 * jnp.einsum(*a, **kw)  # noqa: E731
    options = {"qk_attn_weights_einsum_cls": doubled, "attn_weights_value_einsum_cls": doubled}
    theirs = linen_module(**options).apply(linen_variables(), x)
    assert np.array_equal(linen_module(jflash.flax.attention_fn, **options).apply(linen_variables(), x), theirs)
    assert not np.allclose(linen_module().apply(linen_variables(), x), theirs, atol=0.1)


def test_dropout_in_modules():
    """Both take their rate, their key and `deterministic` from the module."""
    x = random(1, B, S, FEATURES)
    apply = functools.partial(linen_module(reference, dropout_rate=0.4).apply, linen_variables(), x)
    one, again, other = (apply(deterministic=False, rngs={"dropout": jax.random.key(i)}) for i in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-2)
    assert np.allclose(apply(deterministic=True), linen_module().apply(linen_variables(), x), atol=1e-5)
    module = nnx_module(reference, dropout_rate=0.4)
    one, two = (module(x, deterministic=False) for _ in range(2))
    assert not np.allclose(one, two, atol=1e-2)
    assert np.allclose(module(x, deterministic=True), nnx_module()(x), atol=1e-5)


@pytest.mark.parametrize("broadcast", [True, False])
def test_the_module_says_what_attention_fn_is_told(broadcast):
    """linen passes what the signature names; nothing of it may stay behind."""
    told = {}

    @functools.wraps(jflash.flax.attention_fn)
    def spy(*args, **options):
        told.update(options)
        return jflash.flax.attention_fn(*args, **options)

    options = {
        "dropout_rate": 0.4,
        "broadcast_dropout": broadcast,
        "precision": "highest",
        "dtype": jnp.bfloat16,
    }
    module = linen_module(spy, force_fp32_for_softmax=True, **options)
    module.apply(linen_variables(), random(1, B, S, FEATURES), mask=padding, deterministic=True)
    assert np.array_equal(told["mask"], padding)
    assert {name: told[name] for name in options} == options
    assert told["force_fp32_for_softmax"]

"""Where `jflash.flax.attention_fn` leaves the call to Flax: the argument is honoured, or the call raises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import linen, nnx
from jax import lax

from jflash.flax import attention_fn, make_attention_fn
from tests.frameworks.rule import random

B, Sq, Sk, H, D = 2, 7, 11, 4, 8
mask = (np.random.default_rng(5).random((B, 1, 1, Sk)) > 0.3).astype(np.float32)
mask[..., 0] = 1


def operands(Hk=H, dtype=jnp.float32) -> dict:
    shapes = {"query": (B, Sq, H, D), "key": (B, Sk, Hk, D), "value": (B, Sk, Hk, D)}
    return {name: jnp.asarray(random(seed, *shape), dtype) for seed, (name, shape) in enumerate(shapes.items())}


def doubled_dot_general(*args, **kwargs):
    return 2 * lax.dot_general(*args, **kwargs)


def doubled_einsum(*args, **kwargs):
    return 2 * jnp.einsum(*args, **kwargs)


@pytest.mark.parametrize(
    "override",
    [
        {"einsum_dot_general": doubled_dot_general},
        {"qk_attn_weights_einsum": doubled_einsum, "attn_weights_value_einsum": doubled_einsum},
    ],
    ids=["dot_general", "einsums"],
)
def test_an_override_of_the_products_is_called(override):
    x = operands()
    out = attention_fn(**x, mask=mask, **override)
    assert np.array_equal(out, linen.dot_product_attention(**x, mask=mask, **override))
    assert not np.allclose(out, attention_fn(**x, mask=mask), atol=0.1)


def test_an_override_keeps_the_softmax_in_float32():
    x, options = operands(dtype=jnp.bfloat16), {"einsum_dot_general": doubled_dot_general}
    out, theirs = (f(**x, **options, force_fp32_for_softmax=True) for f in (attention_fn, linen.dot_product_attention))
    assert np.array_equal(out, theirs)
    assert not np.array_equal(out, attention_fn(**x, **options))


def test_overrides_that_flax_refuses_are_refused():
    with pytest.raises(ValueError, match="mutually exclusive"):
        attention_fn(
            **operands(),
            precision="highest",
            qk_attn_weights_einsum=jnp.einsum,
            attn_weights_value_einsum=jnp.einsum,
        )


def mentions_of_highest(Hk, precision) -> int:
    jaxpr = jax.make_jaxpr(lambda x: attention_fn(**x, mask=mask, precision=precision))(operands(Hk))
    return str(jaxpr).count("HIGHEST")


@pytest.mark.parametrize("Hk", [H, 2])
def test_precision_in_float32_reaches_the_products(Hk):
    for precision in (None, "default", "highest", lax.Precision.HIGHEST):
        assert mentions_of_highest(Hk, precision) >= 2
    assert mentions_of_highest(Hk, lax.Precision.HIGH) == 0
    with jax.default_matmul_precision("tensorfloat32"):
        assert mentions_of_highest(Hk, None) == 0
        assert mentions_of_highest(Hk, "highest") >= 2


def test_highest_precision_in_float32_needs_no_flax():
    x = operands()
    attend = make_attention_fn(softcap=3.0)
    assert np.array_equal(attend(**x, precision="highest"), attend(**x))
    with jax.default_matmul_precision("tensorfloat32"), pytest.raises(NotImplementedError, match="precision=highest"):
        attend(**x, precision="highest")


def test_precision_changes_nothing_for_16_bit_operands():
    x = operands(dtype=jnp.bfloat16)
    assert np.array_equal(attention_fn(**x, precision="highest"), attention_fn(**x))


class Recorder:
    """Takes what is sown as a linen module would."""

    def __init__(self):
        self.sown = {}

    def sow(self, collection, name, value):
        self.sown[collection, name] = value


@pytest.mark.parametrize("is_causal", [False, True])
def test_sown_weights_are_those_of_the_output(is_causal):
    x, module = operands(Hk=2), Recorder()
    out = attention_fn(**x, mask=mask, module=module, is_causal=is_causal)
    weights = module.sown["intermediates", "attention_weights"]
    assert weights.shape == (B, H, Sq, Sk)
    value = jnp.repeat(x["value"], 2, axis=2)
    assert np.allclose(out, jnp.einsum("bhij,bjhd->bihd", weights, value), atol=1e-5)
    assert np.allclose(weights.sum(-1), 1, atol=1e-5)
    if is_causal:
        assert not np.triu(weights, 1).any()


def test_an_nnx_module_refuses_what_only_linen_has():
    module = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="einsum_dot_general"):
        attention_fn(**operands(), module=module, einsum_dot_general=lax.dot_general)


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ({"module": Recorder()}, "module=Recorder"),
        ({"einsum_dot_general": lax.dot_general}, "einsum_dot_general="),
        ({"precision": lax.Precision.HIGH}, "precision=HIGH in float32"),
    ],
)
def test_options_that_flax_does_not_have_raise_there(argument, reason):
    for option in ({"softcap": 3.0}, {"causal": True}, {"implementation": "xla"}):
        with pytest.raises(NotImplementedError, match=f"{reason} needs Flax's own .* has no {next(iter(option))}="):
            make_attention_fn(**option)(**operands(), **argument)

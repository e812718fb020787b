"""`jflash.flax.attention_fn` as a function, beside the two `dot_product_attention`s of Flax."""

from __future__ import annotations

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import linen, nnx
from jax.extend import core

from jflash.flax import attention_fn, make_attention_fn
from tests.frameworks.rule import assert_as_accurate, assert_same_function, out_and_gradients, random

# A rate that is not used sends nnx to its own code, which keeps float64, and past jax.nn, which does not.
exact = functools.partial(nnx.dot_product_attention, dropout_rate=0.5, deterministic=True)


def operands(batch=(2,), Sq=37, Sk=53, H=4, Hk=4, D=16, Dv=16, bias=None) -> dict:
    arrays = {"query": random(1, *batch, Sq, H, D), "key": random(2, *batch, Sk, Hk, D)}
    arrays["value"] = random(3, *batch, Sk, Hk, Dv)
    return arrays if bias is None else arrays | {"bias": random(4, *bias)}


def random_mask(*shape: int, dtype=np.float32) -> np.ndarray:
    """Hides a third of the keys, and the first from nobody."""
    mask = np.random.default_rng(5).random(shape) > 0.3
    mask[..., 0] = True
    return mask.astype(dtype)


@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        pytest.param(operands(Dv=24), {}, id="value_dim"),
        pytest.param(operands(bias=(1, 4, 37, 53)), {"mask": random_mask(2, 1, 1, 53)}, id="padding_mask_bias"),
        pytest.param(operands(Hk=2), {"mask": random_mask(2, 4, 37, 53, dtype=bool)}, id="gqa_full_mask"),
        pytest.param(
            operands((2, 3), Sq=9, Sk=11, bias=(9, 11)),
            {"mask": random_mask(2, 1, 1, 1, 11)},
            id="two_batch_axes",
        ),
        pytest.param(operands((), Sq=9, Sk=11), {"mask": random_mask(9, 11, dtype=np.int32)}, id="no_batch_axis"),
        pytest.param(operands(Sq=37, Sk=37, Hk=1), {"is_causal": True}, id="causal_gqa"),
        pytest.param(operands(bias=(2, 1, 1, 53)), {"is_causal": True}, id="causal_more_keys"),
        pytest.param(
            operands(Sq=53, Sk=37),
            {"is_causal": True, "mask": random_mask(2, 1, 53, 37)},
            id="causal_more_queries",
        ),
    ],
)
def test_equals_flax(arrays, options):
    ours = make_attention_fn(implementation="reference")
    assert_same_function(lambda x: exact(**x, **options), lambda x: ours(**x, **options), arrays)


def test_equals_flax_in_bfloat16():
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in operands(bias=(1, 4, 1, 53)).items()}
    mask = random_mask(2, 1, 1, 53)
    low = functools.partial(nnx.dot_product_attention, mask=mask)  # jax.nn: the softmax is in float32
    assert_as_accurate(
        lambda x: exact(**x, mask=mask),
        lambda x: attention_fn(**x, mask=mask, force_fp32_for_softmax=True, precision="highest"),
        arrays,
        low=lambda x: low(**x),
    )


def test_a_causal_query_is_hidden_from_later_keys_by_index():
    """With fewer queries than keys, the first query of Flax sees one key, that of jflash more."""
    x = operands(Sq=5, Sk=9)
    ours = attention_fn(**x, is_causal=True)
    assert np.allclose(ours[:, 0], x["value"][:, 0], atol=1e-6)
    assert not np.allclose(ours[:, 0], make_attention_fn(causal=True)(**x)[:, 0], atol=1e-2)
    x["query"] = x["query"][:, 3:4]
    assert np.allclose(attention_fn(**x, is_causal=True), exact(**x, is_causal=True), atol=1e-6)


def test_a_fully_masked_query_gives_zero_where_flax_gives_the_mean():
    x = operands()
    mask = random_mask(2, 1, 37, 53)
    mask[1, 0, 5] = 0
    hidden = np.zeros((2, 37), bool)
    hidden[1, 5] = True
    theirs = jax.jit(exact)(**x, mask=mask)
    found = out_and_gradients(lambda x: attention_fn(**x, mask=mask), x)
    out, d_query = found["out"], found["d"]["query"]
    assert np.array_equal(out[hidden], np.zeros_like(out[hidden]))
    assert np.allclose(theirs[hidden], x["value"][1].mean(0), atol=1e-5)
    assert np.allclose(out[~hidden], theirs[~hidden], atol=1e-5)
    assert np.array_equal(d_query[hidden], np.zeros_like(d_query[hidden]))
    assert all(np.isfinite(g).all() and g.any() for g in found["d"].values())


def test_every_argument_of_flax_has_a_name():
    """linen passes what it finds in the signature and nothing else, so a **kwargs would lose the mask."""
    ours = inspect.signature(attention_fn).parameters
    made = inspect.signature(make_attention_fn(causal=True)).parameters
    for theirs in (linen.dot_product_attention, nnx.dot_product_attention):
        parameters = inspect.signature(theirs).parameters
        assert set(parameters) <= set(ours)
        assert set(parameters) <= set(made)
        positional = list(parameters)[: list(parameters).index("module") + 1]
        assert list(ours)[: len(positional)] == positional
        for name in set(parameters) - {"promote_dtype"}:
            assert parameters[name].default == ours[name].default, name
    assert all(p.kind is not p.VAR_KEYWORD for p in ours.values())


def test_dtype_promotes_as_flax_does():
    x, attend = operands(), make_attention_fn(implementation="reference")
    mixed = x | {"key": x["key"].astype(jnp.bfloat16)}
    assert attend(**mixed).dtype == jnp.float32
    low = attend(**mixed, dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    assert np.array_equal(low, attend(**{name: y.astype(jnp.bfloat16) for name, y in x.items()}))
    asked = []

    def promote(arrays, *, dtype):
        asked.append(dtype)
        return tuple(y.astype(jnp.float16) for y in arrays)

    assert attend(**mixed, dtype=jnp.float32, promote_dtype=promote).dtype == jnp.float16
    assert asked == [jnp.float32]


def largest_intermediate(f, *args) -> int:
    """Elements of the largest array that any equation of f, however nested, computes."""
    return max(_sizes(jax.make_jaxpr(f)(*args).jaxpr), default=0)


def _sizes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in eqn.outvars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))):
            if isinstance(value, core.ClosedJaxpr):
                yield from _sizes(value.jaxpr)
            elif isinstance(value, core.Jaxpr):
                yield from _sizes(value)


def gradient(attend, x, mask, **options):
    return jax.grad(lambda x: attend(**x, mask=mask, **options).sum())(x)


@pytest.mark.parametrize("dropout", [{}, {"broadcast_dropout": True}, {"broadcast_dropout": False}])
def test_memory_grows_with_the_length_and_not_with_its_square(dropout):
    S = 8192
    x, mask = operands((2,), S, S, H=1, Hk=1), jax.ShapeDtypeStruct((2, 1, 1, S), jnp.float32)
    if dropout:
        dropout = {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0), **dropout}
    ours = functools.partial(gradient, attention_fn, **dropout)
    assert largest_intermediate(ours, x, mask) <= 2**22 < S * S
    assert largest_intermediate(functools.partial(gradient, exact), x, mask) >= S * S


def test_a_mask_for_all_heads_is_not_copied_for_each():
    S = 8192
    x, mask = operands((2,), S, S, H=2, Hk=2), jax.ShapeDtypeStruct((1, 1, S, S), jnp.float32)
    ours = functools.partial(gradient, attention_fn, dropout_rate=0.1, dropout_rng=jax.random.key(0))
    assert largest_intermediate(ours, x, mask) == S * S


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        (operands(D=264), {}, ValueError, "head_dim=264 must be <= 256"),
        (operands(H=3, Hk=2), {}, ValueError, "query heads=3 must be a multiple of key/value heads=2"),
        (
            operands(),
            {"dropout_rate": 0.1},
            ValueError,
            "dropout_rate=0.1 with deterministic=False needs dropout_rng",
        ),
        (operands(), {"mask": jnp.ones((2, 1, 37, 52))}, ValueError, "must broadcast to"),
        (operands() | {"key": random(1, 3, 53, 4, 16)}, {}, ValueError, r"batch axes \(2,\), \(3,\), \(2,\)"),
    ],
)
def test_errors_name_the_value_and_the_rule(arrays, options, error, message):
    with pytest.raises(error, match=message):
        attention_fn(**arrays, **options)


def test_batch_axes_of_equal_size_in_another_order_are_refused():
    x = operands((2, 3)) | {"key": random(2, 3, 2, 53, 4, 16), "value": random(3, 3, 2, 53, 4, 16)}
    with pytest.raises(ValueError, match="must be equal"):
        attention_fn(**x)

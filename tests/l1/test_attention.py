"""Every feature of the blocked path, out, lse and all gradients, against the float64 oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import l1_attention
from tests.l1.rule import assert_same, inputs, normal, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("small_tiles")

SHAPES = {
    "ragged": dict(Sq=50, Sk=77),
    "one query": dict(Sq=1, Sk=70, H=4, Hk=2),
    "one key": dict(Sq=70, Sk=1),
    "grouped": dict(B=2, Sq=45, Sk=70, H=6, Hk=3, D=24, Dv=16),
    "multi-query": dict(B=3, Sq=40, H=4, Hk=1, D=37, Dv=80),
    "head dim 256": dict(Sq=40, D=256, Dv=1),
    "head dim 1": dict(Sq=40, D=1, Dv=256),
}
MASKS = {"full": {}, "causal": dict(causal=True), "window": dict(window=(20, 9))}
B, SQ, SK, H = 2, 45, 64, 4  # without a mask, keys in whole tiles compile faster
ONE = dict(B=B, Sq=SQ, Sk=SK, H=H, Hk=2, D=20, Dv=12)


def check(arrays, **options):
    """By the rule; with a softmax the lse too."""
    options = {"return_lse": options.get("weight", "softmax") == "softmax", **options}
    ours, oracle = (
        functools.partial(_attend, options={**options, "implementation": name}) for name in ("xla", "reference")
    )
    assert_same(ours, oracle, arrays)


def _attend(arrays, options):
    return l1_attention(**arrays, **options)


@pytest.mark.parametrize(("shape", "mask"), [*zip(SHAPES, itertools.cycle(MASKS), strict=False), ("grouped", "causal")])
def test_shapes(shape, mask):
    check(inputs(0, **SHAPES[shape]), **MASKS[mask])


@pytest.mark.parametrize("kind", ["neg", "reciprocal"])
@pytest.mark.parametrize(
    ("weight", "dtype"),
    [("softmax", "float32"), ("exp", "float32"), ("tanh1", "float32"), ("softmax", "bfloat16"), ("tanh1", "float16")],
)
def test_kinds_and_weights(kind, weight, dtype):
    eps = 0.05 if weight == "softmax" else 0.5
    check(inputs(1, dtype, **ONE), kind=kind, weight=weight, eps=eps)


@pytest.mark.parametrize(
    "options",
    [
        dict(scale=-0.1),
        dict(scale=0.0),
        dict(kind="reciprocal", scale=1.0),
        dict(kind="reciprocal", scale=0.0, eps=0.5),
        dict(center=True, compute="f32"),
        dict(center=True, weight="tanh1"),
        dict(exclude_diagonal=True),
        dict(exclude_diagonal=True, window=(3, 3), weight="exp"),
        dict(sink=-2.5),
    ],
    ids=str,
)
def test_options(options):
    check(inputs(2, **ONE), **options)


@pytest.mark.parametrize(("shape", "kind"), [((H,), "neg"), ((B, H), "reciprocal")], ids=str)
def test_learned_sink(shape, kind):
    check(inputs(3, **ONE) | {"sink": normal(4, *shape)}, kind=kind, eps=0.05)


def test_one_learned_sink_for_all_heads():
    arrays = inputs(3, **ONE)
    gradient = jax.grad(lambda x: jnp.sin(l1_attention(**arrays, sink=x)).sum())(jnp.float32(0.3))
    by_head = jax.grad(lambda x: jnp.sin(l1_attention(**arrays, sink=x)).sum())(jnp.full((H,), 0.3))
    np.testing.assert_allclose(gradient, by_head.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "weight"),
    [((B, H, SQ, SK), "softmax"), ((1, H, 1, SK), "exp"), ((B, 1, SQ, 1), "tanh1"), ((SQ, SK), "softmax")],
    ids=str,
)
def test_bias(shape, weight):
    check(inputs(5, **ONE) | {"bias": normal(6, *shape)}, weight=weight)


@pytest.mark.parametrize("shape", [(B, 1, SQ, SK), (1, H, 1, SK)], ids=str)
def test_mask(shape):
    mask = jnp.asarray(np.random.default_rng(7).uniform(size=shape) < 0.6)
    check(inputs(8, **ONE), mask=mask)


def test_segment_ids():
    rng = np.random.default_rng(9)
    ids = tuple(jnp.asarray(np.sort(rng.integers(0, 4, (B, n)), axis=1), jnp.int32) for n in (SQ, SK))
    check(inputs(10, **ONE), segment_ids=ids, causal=True)


@pytest.mark.parametrize("options", [{}, dict(window=(5, 2), exclude_diagonal=True)], ids=str)
def test_packed_is_one_after_another(options):
    """Lengths 0 and 1 too, and NaN behind the last sequence."""
    cu = [0, 20, 20, 21, 55]
    arrays = inputs(11, Sq=64, H=4, Hk=2)
    poisoned = {name: x.at[:, cu[-1] :].set(jnp.nan) for name, x in arrays.items()}
    packed = functools.partial(_attend, options={**options, "cu_seqlens": jnp.asarray(cu)})
    found = outputs_and_gradients(packed, poisoned)
    assert not found["out"][:, cu[-1] :].any()
    assert not any(gradient[:, cu[-1] :].any() for gradient in found["d"].values())

    def looped(arrays):
        parts = [
            l1_attention(*(arrays[name][:, a:b] for name in "qkv"), **options, implementation="reference")
            for a, b in itertools.pairwise(cu)
        ]
        return jnp.concatenate([*parts, jnp.zeros((1, 64 - cu[-1], 4, 20))], axis=1)

    expected = outputs_and_gradients(looped, arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_packed_with_lengths_of_their_own():
    q_cu, k_cu = jnp.asarray([0, 9, 30, 45]), jnp.asarray([0, 31, 32, 64])
    arrays = inputs(12, Sq=SQ, Sk=SK)
    out = l1_attention(**arrays, cu_seqlens=(q_cu, k_cu))
    for (a, b), (c, d) in zip(*(itertools.pairwise(x) for x in (q_cu, k_cu)), strict=True):
        alone = l1_attention(arrays["q"][:, a:b], arrays["k"][:, c:d], arrays["v"][:, c:d])
        np.testing.assert_allclose(out[:, a:b], alone, atol=1e-5)


@pytest.mark.parametrize("weight", ["softmax", "tanh1"])
def test_queries_that_see_nothing(weight):
    """Causal with fewer keys than queries: out 0, lse -inf, no gradient, and none in others."""
    arrays = inputs(13, Sq=70, Sk=45)
    options = {"causal": True, "weight": weight}
    check(arrays, **options)
    found = outputs_and_gradients(functools.partial(_attend, options=options), arrays)
    assert not found["out"][:, :25].any()
    assert not found["d"]["q"][:, :25].any()
    assert found["d"]["q"][:, 26:].any()


@pytest.mark.parametrize("shape", [dict(Sq=0), dict(B=0), dict(Sk=0)], ids=str)
@pytest.mark.parametrize("weight", ["softmax", "exp"])
def test_nothing(shape, weight):
    sizes = {"B": 2, "Sq": 5, "Sk": 6} | shape
    q, k = jnp.ones((sizes["B"], sizes["Sq"], 2, 8)), jnp.ones((sizes["B"], sizes["Sk"], 2, 8))
    out, pull = jax.vjp(functools.partial(l1_attention, weight=weight), q, k, k)
    assert out.shape == q.shape
    assert not out.any()
    assert not any(gradient.any() for gradient in pull(jnp.ones_like(out)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_ties_everywhere(dtype):
    """Few values, so that most features of q and k are equal: the rule sign(0) = 0 decides the gradient."""
    arrays = inputs(14, Sq=64, D=32)
    arrays |= {name: jnp.round(arrays[name]).astype(dtype) for name in "qk"} | {"v": arrays["v"].astype(dtype)}
    check({**arrays, "k": arrays["q"]}, kind="neg" if dtype == jnp.float32 else "reciprocal", eps=0.5)


def test_float64():
    with jax.enable_x64(True):
        arrays = {name: np.asarray(x, np.float64) for name, x in inputs(15, **ONE).items()}
        found, expected = (
            outputs_and_gradients(functools.partial(_attend, options={"implementation": name, "scale": 0.2}), arrays)
            for name in ("xla", "reference")
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, expected)
        assert found["out"].dtype == np.float64


def test_16_bit_logits_are_exact():
    """q - k of bfloat16 is taken in float32: the lse is that of the same numbers in float64, to 1e-6."""
    arrays = inputs(16, jnp.bfloat16, Sq=40, D=64)
    _, lse = l1_attention(**arrays, return_lse=True)
    with jax.enable_x64(True):
        wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
        _, ref = l1_attention(**wide, return_lse=True, implementation="reference")
    np.testing.assert_allclose(lse, ref, rtol=2e-6)

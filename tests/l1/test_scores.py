"""Scores alone: the formulas and layouts of the seed, gradients with ties, nothing spread over features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import l1_scores
from tests.l1.rule import assert_same, inputs, normal

pytestmark = pytest.mark.usefixtures("small_tiles")


def formula(arrays, *, scale=None, kind="neg", eps=1e-3, center=False, layout="bhts"):
    """The definition, with |x| = x sign(x)."""
    q, k = arrays["q"], arrays["k"]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k = q.astype(wide), jnp.repeat(k, q.shape[2] // k.shape[2], axis=2).astype(wide)
    size = lambda x: (x * jnp.sign(x)).sum(-1)  # noqa: E731
    d = size(q[:, :, None] - k[:, None])  # [B, t, s, H]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if center:
        d = d - (size(q)[:, :, None] + size(k)[:, None]) / jnp.sqrt(2.0).astype(wide)
    s = -scale * d if kind == "neg" else 1 / (eps + scale * d)
    return jnp.einsum(f"btsh->{layout}", s)


CASES = {
    "neg": {},
    "scale": {"scale": 0.3},
    "center": {"center": True},
    "reciprocal": {"kind": "reciprocal", "eps": 0.01},
    "the README's reciprocal": {"kind": "reciprocal", "scale": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_formula(case):
    arrays = inputs(0, B=2, Sq=45, Sk=70, H=4, Hk=2)
    del arrays["v"]
    options = CASES[case]
    assert_same(lambda a: l1_scores(**a, **options), lambda a: formula(a, **options), arrays)


@pytest.mark.parametrize("layout", ["bhts", "bsth", "bhst"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts(layout, dtype):
    arrays = inputs(1, dtype, B=2, Sq=9, Sk=13, H=3, D=7)
    del arrays["v"]
    assert_same(lambda a: l1_scores(**a, layout=layout), lambda a: formula(a, layout=layout), arrays)
    assert l1_scores(**arrays).dtype == jnp.float32


def test_gradient_of_equal_points_is_0():
    x = normal(2, 1, 5, 2, 6)
    dq, dk = jax.grad(lambda q, k: jnp.diagonal(l1_scores(q, k), axis1=2, axis2=3).sum(), (0, 1))(x, x)
    assert not dq.any()
    assert not dk.any()


def test_transformations():
    q, k = normal(3, 2, 3, 7, 2, 5), normal(4, 2, 3, 9, 2, 5)
    mapped = jax.vmap(jax.jit(l1_scores))(q, k)
    np.testing.assert_array_equal(mapped, jnp.stack([l1_scores(a, b) for a, b in zip(q, k, strict=True)]))
    kept = jax.grad(lambda q: jnp.sin(jax.checkpoint(l1_scores)(q, k[0])).sum())(q[0])
    np.testing.assert_allclose(kept, jax.grad(lambda q: jnp.sin(l1_scores(q, k[0])).sum())(q[0]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_nothing(shape):
    B, Sq, Sk = shape
    q, k = jnp.ones((B, Sq, 2, 8)), jnp.ones((B, Sk, 2, 8))
    s, pull = jax.vjp(l1_scores, q, k)
    assert s.shape == (B, 2, Sq, Sk)
    assert [gradient.shape for gradient in pull(s)] == [q.shape, k.shape]


def test_memory_is_that_of_the_scores():
    """Forward and backward: some copies of the scores, where the formula's gradient has D of them."""
    S, D = 1024, 64
    q = jax.ShapeDtypeStruct((1, S, 2, D), jnp.float32)
    run = jax.jit(lambda q, k: jax.vjp(l1_scores, q, k)[1](jnp.ones((1, 2, S, S))))
    assert run.lower(q, q).compile().memory_analysis().temp_size_in_bytes < 4 * 2 * S * S * 4

"""jit, vmap over every argument, checkpoint, gradient checks; what has no derivative says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jflash import l1_attention, l1_attention_bidi, l1_attention_sparse, l1_scores
from tests.l1.rule import inputs, normal, outputs_and_gradients

N, B, SQ, SK, H = 3, 2, 7, 11, 4
ONE = dict(B=B, Sq=SQ, Sk=SK, H=H, Hk=2, D=6, Dv=5)


def operands(seed: int) -> dict:
    """Every argument that is an array."""
    ids = [
        jnp.asarray(np.random.default_rng(seed + n).integers(0, 2, (B, S)), jnp.int32) for n, S in ((1, SQ), (2, SK))
    ]
    return inputs(seed, **ONE) | {
        "bias": normal(seed + 3, 1, H, SQ, SK),
        "sink": normal(seed + 4, H),
        "mask": normal(seed + 5, B, 1, SQ, SK) > -1,
        "q_ids": ids[0],
        "kv_ids": ids[1],
    }


EXAMPLES = [operands(10 * n) for n in range(N)]
REAL = ("q", "k", "v", "bias", "sink")


def attend(real: dict, other: dict):
    other = dict(other)
    ids = other.pop("q_ids"), other.pop("kv_ids")
    options = {"segment_ids": ids, "exclude_diagonal": True, "return_lse": True, "implementation": "xla"}
    return l1_attention(**real, **other, **options)


@pytest.mark.parametrize("names", [("k", "v"), ("bias", "sink", "q_ids"), tuple(EXAMPLES[0])], ids=str)
def test_vmap_is_a_loop(names):
    """Some arguments mapped, the others shared; a shared argument's gradient is the examples' sum."""
    stacked = {
        name: jnp.stack([e[name] for e in EXAMPLES]) if name in names else EXAMPLES[0][name] for name in EXAMPLES[0]
    }
    real, other = ({n: stacked[n] for n in stacked if (n in REAL) is wanted} for wanted in (True, False))
    axes = tuple({name: 0 if name in names else None for name in part} for part in (real, other))

    def loop(real):
        take = lambda part, i: {n: x[i] if n in names else x for n, x in part.items()}  # noqa: E731
        results = [attend(take(real, i), take(other, i)) for i in range(N)]
        return jax.tree.map(lambda *x: jnp.stack(x), *results)

    mapped = outputs_and_gradients(lambda real: jax.vmap(attend, axes)(real, other), real)
    expected = outputs_and_gradients(loop, real)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), mapped, expected)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in mapped["d"].values())


def test_vmap_of_both_ways_and_of_pairs():
    q, k, v, vb = (normal(n, N, B, SQ, H, 6) for n in range(4))
    pairs = np.argwhere(np.tri(SQ))
    for f in (l1_attention_bidi, lambda q, k, v, vb: l1_attention_sparse(q, k, v, pairs, vb=vb)):
        looped = jnp.stack([f(q[i], k, v[0], vb[i]) for i, k in enumerate(k)])
        np.testing.assert_allclose(jax.vmap(f, (0, 0, None, 0))(q, k, v[0], vb), looped, atol=1e-5)


def test_jit_and_checkpoint_change_nothing():
    arrays = inputs(5, **ONE)
    f = lambda a: jnp.sin(l1_attention(**a, causal=True)).sum()  # noqa: E731
    expected = jax.grad(f)(arrays)
    for g in (jax.jit(jax.grad(f)), jax.grad(jax.checkpoint(f))):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), g(arrays), expected)


FUNCTIONS = {
    "attention": lambda q, k, v: l1_attention(q, k, v, return_lse=True),
    "reciprocal": lambda q, k, v: l1_attention(q, k, v, kind="reciprocal", eps=0.3, sink=0.1),
    "tanh1": lambda q, k, v: l1_attention(q, k, v, weight="tanh1", causal=True),
    "both ways": lambda q, k, v: l1_attention_bidi(q, k, v, jnp.cos(v)),
    "pairs": lambda q, k, v: l1_attention_sparse(q, k, v, np.argwhere(np.tri(5)), vb=jnp.cos(v)),
    "scores": lambda q, k, v: l1_scores(q, k, center=True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_finite_differences(name):
    """In float64, with no feature of q within 1e-3 of one of k, or of 0, where the distance has a corner."""
    rng = np.random.default_rng(6)
    q, k = (rng.permutation(np.arange(60) - 29.7).reshape(1, 5, 2, 6) / 20 + n * 0.011 for n in (0, 1))
    assert np.abs(q[:, :, None] - k[:, None]).min() > 1e-3
    with jax.enable_x64(True):
        check_grads(FUNCTIONS[name], (q, k, rng.normal(size=(1, 5, 2, 3))), order=1, modes=["rev"], eps=1e-6)


def test_second_derivatives():
    arrays = inputs(7, B=1, Sq=5, H=2, D=4)

    def f(v, implementation):
        return (l1_attention(arrays["q"], arrays["k"], v, implementation=implementation) ** 2).sum()

    twice = jax.grad(lambda v, name: jax.grad(f)(v, name).sum())
    assert jnp.abs(twice(arrays["v"], "reference")).max() > 0.01
    with pytest.raises(NotImplementedError, match="pass implementation='reference' for second derivatives"):
        twice(arrays["v"], "xla")

"""Listed pairs: all of them are the dense call, their order is nothing, gradients of everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import l1_attention, l1_attention_bidi, l1_attention_sparse
from tests.l1.rule import assert_same, inputs, normal, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("small_tiles")

B, SQ, SK, H = 2, 17, 23, 4
ONE = dict(B=B, Sq=SQ, Sk=SK, H=H, Hk=2, D=10, Dv=6)


def all_pairs(Sq: int = SQ, Sk: int = SK) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(Sq), np.arange(Sk), indexing="ij"), axis=-1).reshape(-1, 2)


def some_pairs(seed: int, Sq: int = SQ, Sk: int = SK) -> tuple[np.ndarray, np.ndarray]:
    """Pairs in random order, and the mask that says the same; query 3 has none."""
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=(Sq, Sk)) < 0.3
    mask[3] = False
    return rng.permutation(np.argwhere(mask)), mask


def dense(arrays, **options):
    return l1_attention(**arrays, **options, implementation="reference")


@pytest.mark.parametrize(
    "options",
    [
        dict(sink=None),
        dict(sink=0.0),
        dict(sink=0.7, kind="reciprocal", eps=0.05, scale=0.3),
        dict(weight="exp"),
        dict(weight="tanh1", center=True),
    ],
    ids=str,
)
def test_some_pairs_are_a_mask(options):
    pairs, mask = some_pairs(0)
    assert_same(
        lambda a: l1_attention_sparse(**a, pairs=pairs, **options),
        lambda a: dense(a, mask=jnp.asarray(mask), **options),
        inputs(1, **ONE),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_pairs_are_dense_with_the_seed_s_sink(dtype):
    """Which is 0 unless said otherwise."""
    arrays = inputs(2, dtype, **ONE)
    assert_same(lambda a: l1_attention_sparse(**a, pairs=all_pairs()), lambda a: dense(a, sink=0.0), arrays)


def test_learned_sink():
    arrays = inputs(3, **ONE) | {"sink": normal(4, B, H)}
    assert_same(lambda a: l1_attention_sparse(**a, pairs=all_pairs()), dense, arrays)


@pytest.mark.parametrize("weight", ["softmax", "exp"])
def test_both_ways(weight):
    arrays = inputs(5, B=B, Sq=SQ, H=H, Hk=2, D=10, Dv=6)
    pairs, mask = some_pairs(6, SQ, SQ)
    arrays["vb"] = normal(7, *arrays["v"].shape)
    sink = 0.0 if weight == "softmax" else None

    def bidi(a):
        vf = a["v"]
        return l1_attention_bidi(
            a["q"], a["k"], vf, a["vb"], mask=jnp.asarray(mask), weight=weight, sink=sink, implementation="reference"
        )

    assert_same(lambda a: l1_attention_sparse(**a, pairs=pairs, weight=weight), bidi, arrays)


def test_order_of_the_pairs_is_nothing():
    pairs, _ = some_pairs(8)
    arrays = inputs(9, **ONE)
    shuffled = np.random.default_rng(10).permutation(pairs)
    x, y = (outputs_and_gradients(lambda a, p=p: l1_attention_sparse(**a, pairs=p), arrays) for p in (pairs, shuffled))
    assert not np.array_equal(pairs, shuffled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), x, y)


def test_traced_pairs_out_of_range_add_nothing():
    pairs, _ = some_pairs(11)
    wrong = np.concatenate([[[-1, 0], [SQ, 2], [4, SK], [2, -5]], pairs])
    arrays = inputs(12, **ONE)
    run = jax.jit(lambda arrays, pairs: l1_attention_sparse(**arrays, pairs=pairs))
    np.testing.assert_array_equal(run(arrays, wrong), run(arrays, pairs))


def test_pairs_out_of_range_read_nothing():
    """Neither forward nor backward: NaN in the last query and the last key, which have no pair, stays there."""
    arrays = inputs(12, Sq=4, H=1, D=5)
    broken = arrays | {"q": arrays["q"].at[:, 3].set(jnp.nan)} | {x: arrays[x].at[:, 2:].set(jnp.nan) for x in "kv"}
    pairs = np.array([[0, 0], [2, 1], [1, 0], [-1, -1], [4, 4]])
    found, clean = (jax.jit(jax.value_and_grad(_total))(x, pairs) for x in (broken, arrays))
    jax.tree.map(np.testing.assert_array_equal, found, clean)


def _total(arrays, pairs):
    return (l1_attention_sparse(**arrays, pairs=pairs) * normal(18, 1, 4, 1, 5)).sum()


@pytest.mark.parametrize(("Sq", "Sk"), [(0, 0), (3, 0), (0, 3)])
def test_no_tokens(Sq, Sk):
    q, k = jnp.ones((1, Sq, 2, 5)), jnp.ones((1, Sk, 2, 5))
    out = l1_attention_sparse(q, k, k, np.zeros((0, 2), int), vb=k if Sq == Sk else None)
    assert out.shape == (1, Sq, 2, 5)
    assert not out.any()


def test_no_pairs():
    arrays = inputs(13, **ONE)
    found = outputs_and_gradients(lambda a: l1_attention_sparse(**a, pairs=np.zeros((0, 2), int)), arrays)
    assert found["out"].shape == (B, SQ, H, 6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found))


def test_every_derivative():
    """Forward mode, vmap, checkpoint, and a second derivative: it is plain JAX."""
    pairs, _ = some_pairs(14)
    arrays = inputs(15, **ONE)
    f = lambda v: l1_attention_sparse(**{**arrays, "v": v}, pairs=pairs)  # noqa: E731
    _, tangent = jax.jvp(f, (arrays["v"],), (arrays["v"],))
    np.testing.assert_allclose(tangent, f(arrays["v"]), atol=1e-6)  # linear in v
    batch = jnp.stack([arrays["v"], 2 * arrays["v"]])
    np.testing.assert_allclose(jax.vmap(jax.checkpoint(f))(batch)[1], 2 * f(arrays["v"]), atol=1e-6)
    hessian = jax.grad(lambda v: jax.grad(lambda v: (f(v) ** 2).sum() / 2)(v).sum())(arrays["v"])
    expected = jax.vjp(f, arrays["v"])[1](f(jnp.ones_like(arrays["v"])))[0]
    np.testing.assert_allclose(hessian, expected, atol=1e-5)


def test_memory_is_that_of_the_pairs():
    """A million pairs of width 64, backward too, without an array of pairs and features."""
    q = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.float32)
    pairs = jax.ShapeDtypeStruct((2**20, 2), jnp.int32)
    run = jax.jit(jax.grad(lambda q, k, v, p: l1_attention_sparse(q, k, v, p).sum(), argnums=(0, 1, 2)))
    assert run.lower(q, q, q, pairs).compile().memory_analysis().temp_size_in_bytes < 2**20 * 2 * 64 * 4 / 2


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0, 1], [2, 3], [0, 1]], r"pairs\[0\]=\[0, 1\] must be there once, not 2 times"),
        ([[0, 1], [17, 3]], r"pairs\[1\]=\[17, 3\] must be in range\(17\) and range\(23\)"),
        ([[0, 23]], r"pairs\[0\]=\[0, 23\] must be in range"),
        ([[-1, 0]], r"pairs\[0\]=\[-1, 0\] must be in range"),
        ([[0.0, 1.0]], r"pairs float32\[1, 2\] must be integers \[E, 2\] of \(query, key\)"),
        ([[0, 1, 2]], r"pairs int32\[1, 3\] must be integers"),
        ([0, 1], r"pairs int32\[2\] must be integers"),
    ],
)
def test_bad_pairs(pairs, message):
    with pytest.raises(ValueError, match=message):
        l1_attention_sparse(**inputs(16, **ONE), pairs=jnp.asarray(pairs))


def test_other_errors():
    arrays = inputs(17, **ONE)
    with pytest.raises(ValueError, match=r"pairs\[0\]=\[17, 0\] must be in range"):
        jax.jit(lambda a: l1_attention_sparse(**a, pairs=np.array([[17, 0]])))(arrays)
    with pytest.raises(ValueError, match=r"sink=1.0 needs weight='softmax'"):
        l1_attention_sparse(**arrays, pairs=all_pairs(), weight="exp", sink=1.0)
    with pytest.raises(ValueError, match="query length=17 must equal key length=23"):
        l1_attention_sparse(**arrays, pairs=all_pairs(), vb=arrays["v"])
    with pytest.raises(TypeError, match=r"pairs must be a jax or numpy array, got builtins\.list"):
        l1_attention_sparse(**arrays, pairs=[[0, 1]])

"""What holds for any attention: identities between calls, and random calls against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jflash import flash_attention
from tests.oracle import assert_matches_oracle, inputs
from tests.parity.cases import booleans, normal, outputs_and_gradients, segments, slopes

pytestmark = pytest.mark.usefixtures("small_tiles")

B, SQ, SK, H = 2, 50, 70, 4
ONE = {"B": B, "Sq": SQ, "Sk": SK, "H": H, "D": 16}
BEHIND = jnp.arange(SQ)[:, None] + SK - SQ - jnp.arange(SK)  # how far a key is behind the query


def attend(*qkv, **options):
    return flash_attention(*qkv, **options, return_lse=True, implementation="xla")


@st.composite
def calls(draw):
    """The sizes of q, k, v, bias and sinks, and the options of a call."""
    B, Hk, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    H, Sq, Sk = Hk * group, draw(st.integers(1, 90)), draw(st.integers(1, 90))
    square = st.tuples(*(st.sampled_from((1, n)) for n in (B, H, Sq, Sk)))
    sizes = {"B": B, "Sq": Sq, "Sk": Sk, "H": H, "Hk": Hk, "sinks": draw(st.booleans())}
    sizes |= {"D": draw(st.integers(1, 40)), "Dv": draw(st.integers(1, 40))}
    sizes["bias"] = draw(st.none() | square)
    side = st.none() | st.integers(-1, 40)
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(side, side)),
        "softcap": draw(st.none() | st.floats(1, 20)),
        "scale": draw(st.none() | st.floats(-0.3, 0.3)),
    }
    if shape := draw(st.none() | square):
        options["mask"] = booleans(draw(st.integers(0, 99)), *shape)
    if draw(st.booleans()):
        options["segment_ids"] = (segments(1, B, Sq), segments(2, B, Sk))
    if draw(st.booleans()):
        options["alibi_slopes"] = slopes(3, H)
    if draw(st.booleans()):
        options |= {"dropout_rate": draw(st.floats(0.05, 0.9)), "dropout_key": jax.random.key(4)}
    return sizes, options


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(call=calls())
def test_random_calls(dtype, call):
    sizes, options = call
    assert_matches_oracle(inputs(0, jnp.dtype(dtype), **sizes), options, "xla")


def assert_same(ours, theirs, arrays, atol=5e-6):
    """Two functions of the arrays agree in every output and gradient, for random cotangents."""
    for x, y in zip(*(jax.tree.leaves(outputs_and_gradients(f)(arrays)) for f in (ours, theirs)), strict=True):
        finite = jnp.isfinite(y)
        assert jnp.array_equal(finite, jnp.isfinite(x))
        np.testing.assert_allclose(x[finite], y[finite], atol=atol * max(1.0, float(jnp.abs(y[finite]).max())))


SEGMENTS = segments(5, B, SQ), segments(6, B, SK)
HIDDEN = {
    "causal": ({"causal": True}, BEHIND >= 0),
    "window": ({"window": (13, 4)}, (BEHIND <= 13) & (BEHIND >= -4)),
    "left": ({"window": (9, None)}, BEHIND <= 9),
    "segments": ({"segment_ids": SEGMENTS}, (SEGMENTS[0][:, None, :, None] == SEGMENTS[1][:, None, None])),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_whatever_hides_is_a_mask(name):
    options, mask = HIDDEN[name]
    arrays = inputs(7, jnp.float32, **ONE)
    assert_same(lambda a: attend(**a, **options), lambda a: attend(**a, mask=mask), arrays)


def test_alibi_is_a_bias():
    m = slopes(8, H)
    arrays = inputs(9, jnp.float32, **ONE)
    bias = -m[:, None, None] * jnp.abs(BEHIND)
    assert_same(lambda a: attend(**a, alibi_slopes=m), lambda a: attend(**a, bias=bias[None]), arrays)


def test_a_sink_is_a_key_of_value_zero():
    """Whose score is the sink, for every query."""
    arrays = inputs(10, jnp.float32, **ONE, sinks=True)

    def one_more_key(a):
        k, v = (jnp.pad(a[name], ((0, 0), (0, 1), (0, 0), (0, 0))) for name in "kv")
        bias = jnp.zeros((1, H, 1, SK + 1)).at[0, :, 0, SK].set(a["sinks"])
        return attend(a["q"], k, v, bias=bias)

    assert_same(lambda a: attend(**a), one_more_key, arrays)


def test_grouped_heads_are_repeated_heads():
    arrays = inputs(11, jnp.float32, **ONE, Hk=2)

    def repeated(a):
        k, v = (jnp.repeat(a[name], 2, axis=2) for name in "kv")
        return attend(a["q"], k, v, causal=True)

    assert_same(lambda a: attend(**a, causal=True), repeated, arrays)


def test_scale_multiplies_the_queries():
    arrays = inputs(12, jnp.float32, **ONE)
    scaled = lambda a: attend(a["q"] * 0.7, a["k"], a["v"], scale=1.0)  # noqa: E731
    assert_same(lambda a: attend(**a, scale=0.7), scaled, arrays)


def test_a_constant_in_the_bias_moves_lse_alone():
    arrays = inputs(13, jnp.float32, **ONE)
    moved = lambda a: (lambda out, lse: (out, lse - 3))(*attend(**a, bias=jnp.full((1, 1, 1, 1), 3.0)))  # noqa: E731
    assert_same(lambda a: attend(**a), moved, arrays)


@pytest.mark.parametrize("cut", [1, 32, 45])
def test_two_parts_of_the_keys_merge_through_lse(cut):
    """exp(lse) adds up over parts, and out is their mean with those weights: values and gradients."""
    arrays = inputs(14, jnp.float32, **ONE)

    def merged(a):
        parts = [attend(a["q"], a["k"][:, s], a["v"][:, s]) for s in (slice(None, cut), slice(cut, None))]
        lse = jnp.logaddexp(parts[0][1], parts[1][1])
        return sum(out * jnp.moveaxis(jnp.exp(part - lse), 1, 2)[..., None] for out, part in parts), lse

    assert_same(lambda a: attend(**a), merged, arrays)


def test_the_order_of_keys_is_free():
    order = np.random.default_rng(15).permutation(SK)
    arrays = inputs(16, jnp.float32, **ONE, bias=(B, 1, SQ, SK))

    def shuffled(a):
        return attend(a["q"], a["k"][:, order], a["v"][:, order], bias=a["bias"][..., order])

    assert_same(lambda a: attend(**a), shuffled, arrays)


@pytest.mark.parametrize("queries", [0, 20])
def test_hidden_keys_and_queries_at_the_end_do_not_count(queries):
    """More keys of a segment of their own, and more queries of it."""
    arrays = inputs(17, jnp.float32, **ONE)
    more = {"q": queries, "k": 33, "v": 33}

    def padded(a):
        q, k, v = (jnp.concatenate([a[name], normal(18, B, more[name], H, 16)], axis=1) for name in "qkv")
        ids = [jnp.tile(jnp.arange(x.shape[1]) // n, (B, 1)) for x, n in ((q, SQ), (k, SK))]
        out, lse = attend(q, k, v, segment_ids=(ids[0], ids[1]))
        return out[:, :SQ], lse[:, :, :SQ]

    assert_same(lambda a: attend(**a), padded, arrays)


def test_out_is_linear_in_v():
    q, k, v, w = (normal(seed, 1, 60, 2, 16) for seed in range(4))
    one = lambda v: attend(q, k, v, causal=True, softcap=2.0)[0]  # noqa: E731
    np.testing.assert_allclose(one(2 * v - 3 * w), 2 * one(v) - 3 * one(w), atol=1e-5)


def test_weights_add_up_to_one():
    arrays = inputs(19, jnp.float32, **ONE) | {"v": jnp.ones((B, SK, H, 1))}
    np.testing.assert_allclose(attend(**arrays)[0], 1, atol=1e-6)

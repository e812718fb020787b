"""Every feature of the blocked XLA path, out, lse and all gradients, against the float64 oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from jflash import flash_attention
from tests.oracle import assert_matches_oracle, inputs
from tests.parity.cases import booleans, normal, outputs_and_gradients, segments, slopes

pytestmark = pytest.mark.usefixtures("small_tiles")

SHAPES = {
    "square": {"Sq": 64},
    "more_keys": {"Sq": 45, "Sk": 101, "H": 3},
    "fewer_keys": {"Sq": 101, "Sk": 45},
    "one_query": {"Sq": 1, "Sk": 70, "H": 4, "Hk": 2},
    "one_key": {"Sq": 70, "Sk": 1},
    "grouped": {"B": 2, "Sq": 77, "Sk": 100, "H": 6, "Hk": 3, "D": 24, "Dv": 16},
    "multi_query": {"B": 3, "Sq": 50, "H": 4, "Hk": 1, "D": 37, "Dv": 80},
    "head_dim_256": {"Sq": 40, "D": 256, "Dv": 1},
    "head_dim_1": {"Sq": 40, "D": 1, "Dv": 256},
}
B, SQ, SK, H = 2, 77, 100, 6
ONE = {"B": B, "Sq": SQ, "Sk": SK, "H": H, "Hk": 2, "D": 24, "Dv": 16}


def check(arrays, **options):
    strict = arrays["q"].dtype.itemsize == 2  # an atol of their roundings would hide statistics in 16 bits
    assert_matches_oracle(arrays, options, "xla", strict=strict)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    check(inputs(0, jnp.float32, **SHAPES[shape]), causal=True)


@pytest.mark.parametrize("options", [{}, {"window": (20, 9)}], ids=str)
@pytest.mark.parametrize("shape", ["more_keys", "fewer_keys", "grouped"])
def test_without_causal(shape, options):
    check(inputs(0, jnp.float32, **SHAPES[shape]), **options)


@pytest.mark.parametrize("lengths", [(45, 101), (101, 45)], ids=["more_keys", "fewer_keys"])
@pytest.mark.parametrize("window", [(17, None), (None, 11), (0, 0), (3, 40), (70, -1)], ids=str)
def test_windows(window, lengths):
    Sq, Sk = lengths
    check(inputs(1, jnp.float32, Sq=Sq, Sk=Sk, H=1, D=16), window=window)


def test_causal_combines_with_a_window():
    check(inputs(2, jnp.float32, Sq=90, H=1, D=16), causal=True, window=(25, 7))


@pytest.mark.parametrize("scale", [0.6, -0.5, 0.0])
def test_scale(scale):
    check(inputs(3, jnp.float32, **ONE), scale=scale)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"softcap": 0.7, "causal": True, "scale": 1.0}], ids=str)
def test_softcap(options):
    check(inputs(4, jnp.float32, **ONE), **options)


@pytest.mark.parametrize("axes", [*itertools.product([True, False], repeat=4), None], ids=str)
def test_bias(axes):
    """Broadcast over each subset of the axes B, H, Sq, Sk; None is [Sq, Sk]."""
    full = (B, H, SQ, SK)
    shape = full[2:] if axes is None else tuple(n if has else 1 for n, has in zip(full, axes, strict=True))
    check(inputs(5, jnp.float32, **ONE, bias=shape), window=(40, 30))


def test_bias_of_another_dtype():
    """It is added in float32, and its gradient has its own dtype."""
    arrays = inputs(6, jnp.bfloat16, **ONE)
    arrays["bias"] = normal(7, 1, H, SQ, 1)
    check(arrays)


def test_bias_of_minus_infinity_is_a_mask():
    arrays = inputs(9, jnp.float32, **ONE)
    hidden = booleans(10, B, 1, SQ, SK).at[:, :, 5].set(True)
    check({**arrays, "bias": jnp.where(hidden, -jnp.inf, 0.0)})


@pytest.mark.parametrize("shape", [(B, H, SQ, SK), (B, 1, 1, SK), (1, H, SQ, 1), (SQ, SK)], ids=str)
def test_mask(shape):
    check(inputs(11, jnp.float32, **ONE), mask=booleans(12, *shape))


@pytest.mark.parametrize("causal", [False, True])
def test_segment_ids(causal):
    check(inputs(13, jnp.float32, **{**ONE, "Sk": SQ}), segment_ids=segments(14, B, SQ), causal=causal)


def test_segment_ids_of_queries_and_keys():
    """In no order, and query segment 9 has no keys."""
    q_ids = jnp.where(booleans(15, B, SQ, share=0.2), 9, segments(16, B, SQ)[:, ::-1])
    check(inputs(17, jnp.float32, **ONE), segment_ids=(q_ids, segments(18, B, SK)))


@pytest.mark.parametrize(("shape", "causal"), [((H,), False), ((B, H), True)])
def test_alibi(shape, causal):
    check(inputs(19, jnp.float32, **ONE), alibi_slopes=slopes(20, *shape), causal=causal)


@pytest.mark.parametrize("shape", [(H,), (B, H)], ids=str)
def test_sinks(shape):
    """A row that sees no key has its sink alone: out 0, lse the sink."""
    arrays = {**inputs(21, jnp.float32, **ONE), "sinks": normal(22, *shape)}
    check(arrays, mask=booleans(23, B, 1, SQ, 1, share=0.8))


@pytest.mark.parametrize("rate", [0.1, 0.75])
def test_dropout(rate):
    check(inputs(24, jnp.float32, **ONE), dropout_rate=rate, dropout_key=jax.random.key(25))


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtypes(dtype, options):
    check(inputs(26, jnp.dtype(dtype), **ONE), **options)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_everything_at_once(dtype):
    check(
        inputs(27, jnp.dtype(dtype), **ONE, bias=(B, 1, SQ, SK), sinks=True),
        scale=0.3,
        window=(35, 20),
        softcap=3.0,
        mask=booleans(28, 1, H, SQ, SK, share=0.8),
        segment_ids=(segments(29, B, SQ, 2), segments(30, B, SK, 2)),
        alibi_slopes=slopes(31, H),
        dropout_rate=0.3,
        dropout_key=jax.random.key(32),
    )


@pytest.mark.parametrize(("options", "blind"), [({"causal": True}, 53), ({"window": (5, 3)}, 50)])
def test_rows_that_see_no_key(options, blind):
    """Exactly 0 out, -inf lse and no gradient, whatever the cotangents."""
    attend = functools.partial(flash_attention, **options, return_lse=True, implementation="xla")
    run = outputs_and_gradients(lambda a: attend(**a))
    (out, lse), grads = run(inputs(33, jnp.float32, Sq=90, Sk=37))
    assert (out[:, :blind] == 0).all()
    assert (lse[:, :, :blind] == -jnp.inf).all()
    assert jnp.isfinite(lse[:, :, blind:]).all()
    assert (grads["q"][:, :blind] == 0).all()
    assert (grads["q"][:, blind:] != 0).any()


@pytest.mark.parametrize("empty", [{"Sq": 0, "Sk": 5}, {"Sq": 5, "Sk": 0}, {"B": 0, "Sq": 5}], ids=str)
def test_nothing_to_do(empty):
    arrays = inputs(36, jnp.float32, **empty, sinks=True)
    for options in (
        {},
        {"causal": True, "softcap": 2.0, "dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
        {"alibi_slopes": jnp.ones((arrays["q"].shape[0], arrays["q"].shape[2]))},
    ):
        check(arrays, **options)


def test_without_lse():
    """The same bits where lse is not asked for, and so has no cotangent."""
    arrays = inputs(37, jnp.float32, **ONE)
    attend = functools.partial(flash_attention, implementation="xla")
    asked = outputs_and_gradients(lambda a: attend(**a, return_lse=True)[0])(arrays)
    unasked = outputs_and_gradients(lambda a: attend(**a))(arrays)
    for x, y in zip(jax.tree.leaves(asked), jax.tree.leaves(unasked), strict=True):
        assert jnp.array_equal(x, y)
        assert jnp.abs(x).max() > 0.1


def test_x64_changes_no_bit():
    """float32 stays float32 where integers and Python numbers are wide by default."""
    arrays = inputs(38, jnp.float32, **ONE, bias=(1, H, SQ, SK), sinks=True)
    options = {"softcap": 2.0, "alibi_slopes": slopes(39, H), "mask": booleans(40, SQ, SK), "window": (50, 9)}
    options |= {"dropout_rate": 0.2, "dropout_key": jax.random.key(41)}
    results = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            run = outputs_and_gradients(lambda a: flash_attention(**a, **options, return_lse=True))
            results.append(run(arrays, (normal(42, B, SQ, H, 16), normal(43, B, H, SQ))))
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        assert x.dtype == y.dtype == jnp.float32
        assert jnp.array_equal(x, y)

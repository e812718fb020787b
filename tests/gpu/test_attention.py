"""The Hopper kernels against the oracle, on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention, flash_attention_varlen
from tests.masks import blocks
from tests.oracle import assert_matches_oracle, inputs
from tests.varlen.rule import assert_follows, by_sequence, cu_seqlens, packed

SHAPES = {
    "one_tile": dict(Sq=128, D=128),
    "many": dict(B=2, Sq=1024, H=4, D=128),
    "D64": dict(B=2, Sq=1024, H=4, D=64),
    "many_tiles": dict(B=8, Sq=1024, H=8, Hk=2, D=64),
    "multi_query": dict(Sq=512, H=6, Hk=1, D=128),
    "odd": dict(B=2, Sq=1000, H=3, D=128),
    "prime": dict(B=2, Sq=509, H=3, D=64),
    "prime_grouped": dict(B=3, Sq=331, H=4, Hk=2, D=128),
    "short": dict(B=2, Sq=17, H=2, D=128),
    "few_keys": dict(B=2, Sq=300, Sk=40, H=2, D=64),
    "more_keys": dict(B=2, Sq=200, Sk=777, H=2, D=128),
    "fewer_keys": dict(B=1, Sq=777, Sk=200, H=2, D=128),
    "head_dims": dict(B=2, Sq=500, H=2, D=96, Dv=72),
    "small_head_dims": dict(B=2, Sq=333, H=2, D=40, Dv=24),
    "D256": dict(B=2, Sq=1000, H=4, Hk=2, D=256),
    "D256_many": dict(B=2, Sq=1024, H=4, D=256),
    "D200": dict(B=2, Sq=333, Sk=500, H=2, D=200, Dv=256),
    "D192": dict(B=2, Sq=640, H=2, D=192),
    "wider_values": dict(B=2, Sq=500, H=4, Hk=2, D=64, Dv=128),
    "narrower_values": dict(B=2, Sq=333, H=2, D=128, Dv=40),
    "D192_Dv128": dict(B=2, Sq=517, H=4, Hk=2, D=192, Dv=128),
    "sinks": dict(B=2, Sq=700, H=4, Hk=2, D=128, sinks=True),
    "sinks_D64": dict(B=2, Sq=700, Sk=300, H=2, D=64, sinks=True),
}
CAUSAL, WINDOW, BOTH_SIDES = dict(causal=True), dict(causal=True, window=(100, None)), dict(window=(33, 70))
CASES = [
    *((shape, {}) for shape in ("one_tile", "many", "D64", "odd", "prime", "few_keys", "head_dims", "sinks")),
    *((shape, {}) for shape in ("D256", "D256_many", "D192_Dv128")),
    *((shape, CAUSAL) for shape in SHAPES if shape not in ("one_tile", "few_keys")),
    *((shape, WINDOW) for shape in ("many", "D64", "prime_grouped", "multi_query")),
    *((shape, BOTH_SIDES) for shape in ("many", "prime", "more_keys", "D256_many", "D192")),
]


@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_matches_oracle(shape, options):
    assert_matches_oracle(inputs(0, jnp.bfloat16, **SHAPES[shape]), options, "hopper")


SEGMENTS = tuple(jax.random.randint(jax.random.key(n), (2, length), 0, 3) for n, length in enumerate((700, 900)))
DROPOUT = dict(dropout_rate=0.2, dropout_key=jax.random.key(7))
ORDERED = tuple(jnp.sort(ids, axis=1) for ids in SEGMENTS)
FEATURES = {
    "softcap": (dict(Sq=1000, D=128), dict(causal=True, softcap=3.0)),
    "softcap_D64": (dict(Sq=1000, D=64), dict(softcap=20.0)),
    "softcap_causal_D64": (dict(B=2, Sq=1024, H=4, D=64), dict(causal=True, softcap=20.0)),
    "alibi": (dict(Sq=500, Sk=700, H=4, Hk=2, D=128), dict(alibi_slopes=jnp.array([0.5, 0.1, 0.02, 0.004]))),
    "alibi_of_each_batch_D64": (
        dict(B=2, Sq=500, H=1, D=64),
        dict(causal=True, softcap=5.0, alibi_slopes=jnp.array([[0.3], [0.02]])),
    ),
    "softcap_D256": (dict(Sq=500, D=256, sinks=True), dict(softcap=5.0)),
    "alibi_D256": (dict(Sq=300, Sk=400, H=2, D=256), dict(causal=True, alibi_slopes=jnp.array([0.5, 0.02]))),
    "segments_D256": (dict(B=2, Sq=700, Sk=900, D=256), dict(segment_ids=SEGMENTS)),
    "segments": (dict(B=2, Sq=700, Sk=900, D=128), dict(segment_ids=SEGMENTS)),
    "segments_D64": (dict(B=2, Sq=700, Sk=900, D=64), dict(causal=True, segment_ids=SEGMENTS)),
    "dropout": (dict(Sq=1000, H=4, Hk=2, D=128), dict(causal=True, **DROPOUT)),
    "dropout_D64": (dict(B=2, Sq=700, Sk=900, H=2, D=64), dict(softcap=5.0, **DROPOUT)),
    "dropout_many_tiles_D64": (dict(B=8, Sq=1024, H=8, Hk=2, D=64), dict(causal=True, **DROPOUT)),
    "dropout_D256": (dict(Sq=500, H=4, Hk=2, D=256), dict(causal=True, softcap=5.0, **DROPOUT)),
    "dropout_D192": (dict(Sq=517, H=2, D=192, Dv=128), DROPOUT),
    "dropout_deterministic": (dict(Sq=700, H=2, D=128), dict(deterministic=True, **DROPOUT)),
    "mask": (dict(Sq=1000, Sk=1200, H=4, Hk=2, D=128), dict(causal=True, mask=blocks(1, 4, 1000, 1200, size=128))),
    "mask_aligned": (dict(B=2, Sq=1024, H=2, D=128), dict(mask=blocks(2, 1, 1024, 1024, size=256))),
    "mask_D64": (dict(B=2, Sq=700, Sk=900, H=2, D=64), dict(mask=blocks(2, 1, 700, 900, size=100))),
    "mask_many_tiles_D64": (dict(B=8, Sq=1024, H=8, Hk=2, D=64), dict(mask=blocks(8, 1, 1024, 1024, size=128))),
    "mask_of_keys": (dict(B=2, Sq=700, Sk=900, D=128), dict(mask=blocks(2, 1, 1, 900, size=70))),
    "mask_of_queries": (dict(B=2, Sq=700, Sk=300, H=2, Hk=1, D=64), dict(mask=blocks(1, 2, 700, 1, size=40))),
    "mask_D256": (dict(Sq=500, Sk=640, H=2, Hk=1, D=256), dict(mask=blocks(1, 2, 500, 640), **DROPOUT)),
    "mask_deterministic": (
        dict(B=2, Sq=700, Sk=900, D=64, sinks=True),
        dict(deterministic=True, mask=blocks(2, 1, 700, 900), segment_ids=SEGMENTS),
    ),
    "bias": (dict(Sq=1000, Sk=1200, H=4, Hk=2, D=128, bias=(1, 4, 1000, 1200)), dict(causal=True, **DROPOUT)),
    "bias_of_all": (dict(B=3, Sq=1024, H=4, Hk=2, D=128, bias=(1, 4, 1024, 1024)), dict(causal=True)),
    "bias_of_all_D64": (dict(B=3, Sq=1000, H=4, D=64, bias=(1, 4, 1000, 1000)), dict(causal=True)),
    "bias_of_each": (dict(B=2, Sq=1024, H=2, D=128, bias=(2, 2, 1024, 1024)), {}),
    "bias_D64": (dict(B=2, Sq=700, Sk=900, H=2, D=64, bias=(1, 1, 700, 900)), dict(mask=blocks(2, 1, 700, 900))),
    "bias_of_keys": (dict(B=2, Sq=700, Sk=900, H=4, Hk=2, D=64, bias=(2, 1, 1, 900)), dict(window=(90, 20))),
    "bias_of_keys_D256": (dict(B=2, Sq=500, H=2, D=256, bias=(1, 2, 1, 500)), {}),
    "bias_of_queries": (dict(B=2, Sq=700, H=2, D=64, bias=(1, 2, 700, 1), sinks=True), dict(causal=True)),
    "bias_deterministic": (
        dict(B=2, Sq=700, H=2, Hk=1, D=128, bias=(2, 2, 700, 700)),
        dict(deterministic=True, softcap=5.0),
    ),
    "bias_of_keys_deterministic": (dict(Sq=700, H=2, D=64, bias=(1, 2, 1, 700)), dict(deterministic=True)),
    "bias_softcap": (dict(Sq=700, H=4, Hk=2, D=128, bias=(1, 4, 700, 700)), dict(softcap=3.0, **DROPOUT)),
    "bias_D256": (dict(B=2, Sq=500, H=4, Hk=2, D=256, bias=(1, 4, 500, 500)), dict(causal=True)),
    "bias_D192": (dict(B=2, Sq=517, H=2, D=192, Dv=128, bias=(2, 2, 517, 517)), {}),
    "deterministic_D256": (dict(B=2, Sq=1000, H=4, Hk=2, D=256), dict(causal=True, deterministic=True)),
    "deterministic_D192": (
        dict(Sq=700, Sk=900, H=2, D=192, Dv=128, sinks=True),
        dict(deterministic=True, softcap=5.0, window=(70, 30), alibi_slopes=jnp.array([0.3, 0.02])),
    ),
    "deterministic_D200": (dict(B=2, Sq=333, Sk=500, H=2, D=200, Dv=256), dict(deterministic=True)),
    "deterministic_D256_masked": (
        dict(B=2, Sq=700, Sk=900, H=2, Hk=1, D=256),
        dict(deterministic=True, mask=blocks(2, 1, 700, 900), segment_ids=SEGMENTS, **DROPOUT),
    ),
    "deterministic_D256_bias": (dict(B=2, Sq=500, H=2, D=256, bias=(2, 2, 500, 500)), dict(deterministic=True)),
    "nothing_is_seen": (dict(Sq=300, H=1, D=128), dict(mask=jnp.zeros((1, 1, 300, 300), bool))),
    "ordered_segments": (dict(B=2, Sq=700, Sk=900, H=4, Hk=2, D=128), dict(segment_ids=ORDERED)),
    "ordered_segments_D64": (dict(B=2, Sq=700, Sk=900, D=64), dict(causal=True, segment_ids=ORDERED)),
    "ordered_segments_D256": (dict(B=2, Sq=700, Sk=900, D=256), dict(segment_ids=ORDERED)),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name):
    shape, options = FEATURES[name]
    assert_matches_oracle(inputs(0, jnp.bfloat16, **shape), options, "hopper")


PACKED = {
    "full": ((300, 1, 511, 212), (300, 1, 511, 212), dict(D=128), {}),
    "causal": ((130, 0, 626), (60, 5, 991), dict(D=128), dict(causal=True)),
    "causal_D256": ((130, 0, 326), (60, 5, 691), dict(D=256), dict(causal=True)),
    "window_D64": ((700, 324), (700, 324), dict(D=64), dict(causal=True, window=(50, None))),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name):
    q_lengths, k_lengths, shape, options = PACKED[name]
    cu_q, cu_k = cu_seqlens(*q_lengths), cu_seqlens(*k_lengths)
    arrays = packed(0, jnp.bfloat16, Tq=sum(q_lengths), Tk=sum(k_lengths), **shape)

    def ours(arrays):
        return flash_attention_varlen(
            **arrays, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options, return_lse=True, implementation="hopper"
        )

    def oracle(arrays):
        return by_sequence(**arrays, cu_q=np.asarray(cu_q), cu_k=np.asarray(cu_k), **options)

    assert_follows(ours, oracle, arrays)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_bias_of_another_dtype(dtype):
    """As added in bfloat16, for its values are."""
    arrays = inputs(0, jnp.bfloat16, B=2, Sq=600, H=2, D=128, bias=(1, 2, 600, 600))
    outputs = []
    for kind in (jnp.bfloat16, dtype):
        bias = (arrays["bias"].astype(jnp.bfloat16) / 8).astype(kind)
        outputs.append(flash_attention(*(arrays[n] for n in "qkv"), bias=bias, implementation="hopper"))
    assert jnp.array_equal(*outputs)


def test_float16():
    assert_matches_oracle(inputs(1, jnp.float16, **SHAPES["prime_grouped"]), CAUSAL, "hopper")


def test_float32_operands_are_not_rounded():
    assert_matches_oracle(inputs(1, jnp.float32, Sq=300, H=2, D=64), CAUSAL, "xla")


def test_same_bits_under_x64():
    q, k, v = inputs(1, jnp.bfloat16, **SHAPES["prime"]).values()

    def run():
        out, pull = jax.vjp(lambda *a: flash_attention(*a, causal=True, implementation="hopper"), q, k, v)
        return out, pull(out)[1:]  # dQ is summed in no fixed order

    narrow = run()
    with jax.enable_x64(True):
        wide = run()
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, narrow, wide)))


@pytest.mark.parametrize("D", [128, 256])
def test_scale(D):
    assert_matches_oracle(inputs(2, jnp.bfloat16, Sq=512, D=D), dict(scale=0.7), "hopper")


@pytest.mark.parametrize("shape", ["multi_query", "prime", "head_dims"])
def test_deterministic(shape):
    assert_matches_oracle(inputs(5, jnp.bfloat16, **SHAPES[shape]), dict(causal=True, deterministic=True), "hopper")


@pytest.mark.parametrize("D", [64, 128, 192, 256])
def test_deterministic_gives_the_same_bits_250_times(D):
    q, k, v = inputs(6, jnp.bfloat16, B=2, Sq=900, H=8, Hk=4, D=D).values()

    def run(q, k, v):
        out, pull = jax.vjp(
            lambda *a: flash_attention(*a, causal=True, deterministic=True, implementation="hopper"), q, k, v
        )
        return out, *pull(jnp.sin(3 * out.astype(jnp.float32)).astype(out.dtype))

    run = jax.jit(run)
    first = run(q, k, v)
    for n in range(250):
        assert all(jnp.array_equal(x, y) for x, y in zip(first, run(q, k, v), strict=True)), n


def test_vmap_is_a_loop():
    arrays = [jnp.stack([x, x[::-1]]) for x in inputs(3, jnp.bfloat16, B=2, Sq=300, H=2, D=64).values()]

    def f(q, k, v):
        return flash_attention(q, k, v, causal=True, implementation="hopper")

    def both(q, k, v):
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(jnp.sin(out.astype(jnp.float32)).astype(out.dtype))

    mapped = jax.jit(jax.vmap(both))(*arrays)
    looped = [jax.jit(both)(*(x[i] for x in arrays)) for i in range(2)]
    for name, x, *one in zip(["out", "dq", "dk", "dv"], mapped, *looped, strict=True):
        x, one = np.asarray(x, np.float32), np.asarray(jnp.stack(one), np.float32)
        # dQ is summed in no fixed order
        np.testing.assert_allclose(x, one, atol=2e-2 if name == "dq" else 0, err_msg=name)


def test_repeats():
    """Forward, dK and dV give the same bits every run; dQ differs by the order of its sum at most."""
    q, k, v = inputs(4, jnp.bfloat16, B=2, Sq=900, H=4, D=128).values()
    run = jax.jit(lambda *a: jax.vjp(lambda *b: flash_attention(*b, causal=True, return_lse=True), *a))
    (out, lse), pull = run(q, k, v)
    grads = pull((out, lse))
    for _ in range(50):
        (out2, lse2), pull = run(q, k, v)
        again = pull((out, lse))
        assert jnp.array_equal(out, out2)
        assert jnp.array_equal(lse, lse2)
        assert all(jnp.array_equal(x, y) for x, y in zip(grads[1:], again[1:], strict=True))
        atol = 2 * jnp.abs((grads[0] + 0.3 - 0.3) - grads[0]).max()
        assert jnp.abs(grads[0] - again[0]).max() <= atol

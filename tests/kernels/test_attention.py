"""The Hopper attention kernels, forward and backward, in the interpreter: numbers, barriers and races.

Two blocks of keys or queries show most of what many would. The interpreter of JAX 0.10 is slow, sees few
races and cannot read past the end of an array, so it gets a few cases.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.parts import schedule
from tests.kernels.interpreted import hopper_on_the_cpu
from tests.masks import blocks
from tests.oracle import assert_matches_oracle, inputs

DROPOUT = dict(dropout_rate=0.3, dropout_key=jax.random.key(7))


SEGMENTS = tuple(jax.random.randint(jax.random.key(n), (2, length), 0, 3) for n, length in enumerate((200, 300)))
CASES = {
    "full": (dict(Sq=128, Sk=384, D=128), {}),
    "causal": (dict(Sq=256, H=1, D=128), dict(causal=True)),
    "causal_D64": (dict(Sq=384, H=2, D=64), dict(causal=True)),
    "grouped_D64": (dict(Sq=384, H=2, Hk=1, D=64), dict(causal=True)),
    "window": (dict(Sq=256, H=1, D=128), dict(window=(70, 30))),
    "left_window_D64": (dict(Sq=384, H=1, D=64), dict(causal=True, window=(100, None))),
    "ragged": (dict(Sq=150, Sk=130, H=1, D=128), dict(causal=True)),
    "ragged_D64": (dict(B=2, Sq=131, Sk=309, H=1, D=64), {}),
    "tiny": (dict(B=2, Sq=3, Sk=5, H=2, Hk=1, D=64), dict(causal=True)),
    "head_dims": (dict(Sq=128, H=1, D=100, Dv=72), {}),
    "small_head_dims": (dict(Sq=70, H=2, D=40, Dv=24), dict(causal=True)),
    "wider_values": (dict(Sq=70, Sk=90, H=2, Hk=1, D=64, Dv=128), dict(causal=True, softcap=5.0)),
    "narrower_values": (dict(Sq=70, H=1, D=128, Dv=40), {}),
    "D256": (dict(Sq=192, H=2, Hk=1, D=256), {}),
    "D256_causal": (dict(Sq=256, H=1, D=256), dict(causal=True)),
    "D256_growing_scores": (dict(Sq=64, Sk=256, H=1, D=256), dict(scale=0.5)),
    "D256_ragged": (dict(Sq=150, Sk=130, H=1, D=200), dict(window=(70, 30), softcap=5.0)),
    "D192_Dv128": (dict(Sq=128, H=2, Hk=1, D=192, Dv=128, sinks=True), dict(causal=True)),
    "sinks": (dict(Sq=192, H=2, Hk=1, D=128, sinks=True), dict(causal=True)),
    "rows_without_keys": (dict(Sq=130, Sk=50, H=2, D=64, sinks=True), dict(causal=True)),
    "no_rows_see_keys": (dict(Sq=256, Sk=128, H=1, D=128), dict(causal=True)),
    "scale": (dict(Sq=128, H=1, D=128), dict(scale=0.5)),
    "softcap": (dict(Sq=256, H=1, D=128), dict(causal=True, softcap=3.0)),
    "softcap_D64": (dict(Sq=192, H=1, D=64), dict(softcap=20.0)),
    "alibi": (dict(Sq=150, Sk=200, H=2, Hk=1, D=128), dict(alibi_slopes=jnp.array([0.3, 0.02]))),
    "alibi_of_each_batch_D64": (
        dict(B=2, Sq=200, H=1, D=64),
        dict(causal=True, softcap=5.0, alibi_slopes=jnp.array([[0.3], [0.02]])),
    ),
    "deterministic": (dict(Sq=256, H=2, Hk=1, D=128), dict(causal=True, deterministic=True)),
    "deterministic_ragged": (dict(Sq=150, Sk=130, H=1, D=96, Dv=72), dict(deterministic=True)),
    "deterministic_features": (
        dict(B=2, Sq=200, Sk=300, H=1, D=64, sinks=True),
        dict(deterministic=True, softcap=5.0, window=(90, 20), segment_ids=SEGMENTS),
    ),
    "deterministic_D192": (
        dict(Sq=150, Sk=130, H=2, Hk=1, D=192, Dv=128, sinks=True),
        dict(deterministic=True, softcap=5.0, window=(70, 30), alibi_slopes=jnp.array([0.3, 0.02])),
    ),
    "deterministic_D256_masked": (
        dict(B=2, Sq=200, Sk=300, H=1, D=200, Dv=256),
        dict(deterministic=True, mask=blocks(2, 1, 200, 300), segment_ids=SEGMENTS, **DROPOUT),
    ),
    "deterministic_D256_bias": (dict(Sq=130, Sk=100, H=1, D=256, bias=(1, 1, 130, 100)), dict(deterministic=True)),
    "segments": (dict(Sq=256, H=1, D=128), dict(causal=True, segment_ids=jnp.repeat(jnp.arange(4), 64)[None])),
    "segments_D64": (dict(B=2, Sq=200, Sk=300, H=1, D=64), dict(segment_ids=SEGMENTS)),
    "dropout": (dict(Sq=150, Sk=200, H=2, Hk=1, D=128), dict(causal=True, **DROPOUT)),
    "dropout_D64": (dict(B=2, Sq=200, H=1, D=64), dict(softcap=5.0, mask=blocks(1, 1, 200, 200), **DROPOUT)),
    "dropout_D256": (dict(Sq=128, H=2, Hk=1, D=256), dict(causal=True, softcap=5.0, **DROPOUT)),
    "dropout_deterministic": (dict(Sq=150, H=1, D=64), dict(deterministic=True, **DROPOUT)),
    "mask": (dict(Sq=256, Sk=512, H=2, Hk=1, D=128), dict(causal=True, mask=blocks(1, 2, 256, 512, size=128))),
    "mask_D64": (dict(B=2, Sq=300, Sk=270, H=1, D=64), dict(mask=blocks(2, 1, 300, 270, size=100))),
    "mask_of_keys": (dict(B=2, Sq=200, Sk=300, H=1, D=128), dict(mask=blocks(2, 1, 1, 300, size=70))),
    "mask_of_queries": (dict(B=2, Sq=300, Sk=130, H=2, Hk=1, D=64), dict(mask=blocks(1, 2, 300, 1, size=40))),
    "mask_D256": (dict(Sq=192, Sk=256, H=2, Hk=1, D=256), dict(mask=blocks(1, 2, 192, 256), **DROPOUT)),
    "mask_deterministic": (
        dict(B=2, Sq=200, Sk=300, H=1, D=64, sinks=True),
        dict(deterministic=True, mask=blocks(2, 1, 200, 300), segment_ids=SEGMENTS),
    ),
    "bias": (dict(Sq=150, Sk=200, H=2, Hk=1, D=128, bias=(1, 2, 150, 200)), dict(causal=True, **DROPOUT)),
    "bias_of_all_D64": (dict(B=2, Sq=150, Sk=130, H=2, D=64, bias=(1, 2, 150, 130)), dict(causal=True)),
    "bias_of_each_D64": (dict(B=2, Sq=128, H=1, D=64, bias=(2, 1, 128, 128)), {}),
    "bias_of_keys": (dict(B=2, Sq=150, Sk=130, H=2, Hk=1, D=64, bias=(2, 1, 1, 130)), dict(window=(90, 20))),
    "bias_of_queries": (dict(B=2, Sq=130, Sk=70, H=2, D=64, bias=(1, 2, 130, 1), sinks=True), dict(causal=True)),
    "bias_deterministic": (
        dict(B=2, Sq=130, Sk=100, H=2, Hk=1, D=64, bias=(2, 2, 130, 100)),
        dict(deterministic=True, softcap=5.0),
    ),
    "bias_softcap": (dict(Sq=128, H=2, Hk=1, D=128, bias=(1, 2, 128, 128)), dict(causal=True, softcap=3.0, **DROPOUT)),
    "bias_D256": (dict(B=2, Sq=128, H=1, D=256, bias=(1, 1, 128, 128)), dict(mask=blocks(2, 1, 128, 128))),
    "segments_in_order": (
        dict(Sq=384, H=2, Hk=1, D=128),
        dict(causal=True, segment_ids=jnp.asarray(np.repeat([3, 4, 9, 9], [130, 60, 150, 44]))[None]),
    ),
}
OLD = jax.__version_info__ < (0, 11)
RUN = {"full", "grouped_D64"} if OLD else CASES
# What the others show too.
SLOW = {"dropout", "dropout_D256", "dropout_deterministic", "mask", "mask_D64", "mask_D256", "segments_in_order"}
SLOW |= {"mask_of_keys", "mask_of_queries", "bias_softcap", "bias_deterministic", "bias_of_each_D64", "bias_D256"}
SLOW |= {"bias_of_all_D64"}
SLOW |= {"bias_of_keys", "bias_of_queries", "segments", "segments_D64", "mask_deterministic"}
SLOW |= {"deterministic_D192", "deterministic_D256_masked", "deterministic_D256_bias"}
SLOW |= {"narrower_values", "window", "ragged_D64", "alibi_of_each_batch_D64", "deterministic_ragged"}


def case(name: str):
    return pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


@pytest.mark.parametrize("name", [case(name) for name in CASES if name in RUN])
def test_matches_oracle(name):
    shape, options = CASES[name]
    with hopper_on_the_cpu():
        assert_matches_oracle(inputs(0, jnp.bfloat16, **shape), options, "hopper")


@pytest.mark.skipif(OLD, reason="slow on this JAX")
def test_float16():
    with hopper_on_the_cpu():
        assert_matches_oracle(inputs(1, jnp.float16, Sq=128, H=1, D=128), dict(causal=True), "hopper")


@pytest.mark.skipif(OLD, reason="slow on this JAX")
@pytest.mark.parametrize(
    ("D", "Dv", "options"),
    [
        (64, 64, {"segment_ids": jnp.arange(384)[None] // 99}),
        (128, 128, {"causal": True}),
        pytest.param(192, 128, {}, marks=pytest.mark.slow),
    ],
)
def test_a_cta_takes_several_tiles(D, Dv, options):
    """As on a GPU with two SMs."""
    with mock.patch.object(schedule, "SMS", 2), hopper_on_the_cpu():
        assert_matches_oracle(inputs(2, jnp.bfloat16, Sq=384, H=2, D=D, Dv=Dv), options, "hopper")

"""The Hopper kernels of L1 attention against the oracle, on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import l1_attention
from tests.l1.rule import inputs
from tests.oracle import on_the_cpu
from tests.varlen.rule import assert_follows

CASES = {
    "one_tile": (dict(Sq=128, D=64), {}),
    "many": (dict(B=2, Sq=512, H=2, D=64), {}),
    "causal": (dict(Sq=512, H=2, D=64), dict(causal=True)),
    "prime": (dict(B=2, Sq=331, H=3, D=64), dict(causal=True)),
    "D128": (dict(Sq=384, H=2, D=128), {}),
    "D128_ragged": (dict(Sq=301, Sk=403, H=2, D=128), dict(causal=True)),
    "grouped": (dict(B=2, Sq=200, Sk=333, H=4, Hk=2, D=32), dict(causal=True)),
    "head_dims": (dict(Sq=200, H=2, D=72, Dv=24), {}),
    "small_head_dims": (dict(Sq=150, H=2, D=20, Dv=100), dict(window=(50, 20))),
    "short": (dict(B=2, Sq=17, H=2, D=64), {}),
    "few_keys": (dict(Sq=300, Sk=40, D=64), {}),
    "fewer_keys": (dict(Sq=300, Sk=100, D=64), dict(causal=True)),
    "sink": (dict(Sq=300, H=2, D=64), dict(sink=jnp.array([0.3, -1.0]))),
    "scale": (dict(Sq=300, D=64), dict(scale=0.3)),
    "reciprocal": (dict(Sq=300, D=64), dict(kind="reciprocal", eps=0.5)),
    "segments": (dict(Sq=300, D=64), dict(segment_ids=jnp.repeat(jnp.arange(5), 60)[None])),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, dtype):
    shape, options = CASES[name]
    _assert_matches_oracle(inputs(0, jnp.dtype(dtype), **shape), options)


def test_bfloat16_subtracted_in_float32():
    _assert_matches_oracle(inputs(1, jnp.bfloat16, Sq=300, D=64), dict(compute="f32"))


def test_float16():
    _assert_matches_oracle(inputs(1, jnp.float16, Sq=200, D=128), dict(causal=True))


def _assert_matches_oracle(arrays: dict, options: dict) -> None:
    attend = functools.partial(l1_attention, **options, return_lse=True)
    assert_follows(
        lambda arrays: attend(**arrays, implementation="hopper"),
        lambda arrays: attend(**arrays, implementation="reference"),
        arrays,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits_every_run(dtype):
    arrays = inputs(2, jnp.dtype(dtype), B=2, Sq=900, H=4, D=64)

    def run(arrays):
        attend = functools.partial(l1_attention, causal=True, implementation="hopper")
        out, pull = jax.vjp(lambda arrays: attend(**arrays), arrays)
        return out, pull(jnp.sin(3 * out.astype(jnp.float32)).astype(out.dtype))

    run = jax.jit(run)
    first = run(arrays)
    for _ in range(50):
        assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, first, run(arrays))))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packed_scores_are_as_good_as_subtracted_ones(dtype):
    """One key: its lse is its score."""
    arrays = inputs(4, jnp.dtype(dtype), B=256, Sq=256, Sk=1, D=128)
    packed, subtracted = (
        l1_attention(**arrays, return_lse=True, compute=compute, implementation="hopper")[1]
        for compute in ("auto", "f32")
    )
    assert jnp.abs(packed / subtracted - 1).max() < 1e-5


def test_long_sums_stay_exact():
    """As many keys as would make the tensor cores' own sums drift."""
    arrays = inputs(3, Sq=64, Sk=16384, H=1, D=64)
    ours = np.asarray(l1_attention(**arrays, implementation="hopper"))
    with jax.enable_x64(True), on_the_cpu():
        wide: dict = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        exact = np.asarray(l1_attention(**wide, implementation="xla"))
    assert np.abs(ours - exact).max() <= 1e-5 * np.abs(exact).max()

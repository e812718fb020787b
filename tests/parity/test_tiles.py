"""The tiles that users get: what they cover, and results of problems that need many of them."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jflash import flash_attention
from jflash.xla import tiles
from pallas_kernels.problem import AttentionProblem
from tests.oracle import assert_matches_oracle, inputs
from tests.parity.cases import outputs_and_gradients

lengths = st.integers(1, 20_000)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(lengths, lengths, st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.sampled_from(["cpu", "sm_80"]))
def test_tiles_cover_a_problem_within_the_budget(Sq, Sk, B, Hk, group, target):
    p = AttentionProblem(target, "float32", B, group * Hk, Hk, Sq, Sk, D=8, Dv=8, scale=1.0)
    t = tiles.choose(p, block_q=512, block_k=256)
    assert (t.nq - 1) * t.bq < Sq <= t.nq * t.bq
    assert (t.nk - 1) * t.bk < Sk <= t.nk * t.bk
    assert B % t.b == 0
    assert Hk % t.h == 0
    assert t.bk <= 256
    assert t.bq <= 512
    in_flight = t.b * t.h * group * t.bq * t.bk
    assert in_flight <= (2**19 if target == "cpu" else 2**26) or (t.b == t.h == 1 and t.bq <= 64)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (dict(Sq=1100, Sk=1300, H=1, D=16), dict(causal=True)),
        (dict(Sq=1300, Sk=1100, H=1, D=16), dict(window=(300, 77))),
        (dict(B=6, Sq=520, H=4, Hk=2, D=8), dict(causal=True, softcap=3.0)),  # a few batch entries at a time
        (dict(Sq=1030, Sk=520, H=12, Hk=6, D=8), dict()),  # a few heads at a time
    ],
    ids=str,
)
def test_matches_oracle(sizes, options):
    assert_matches_oracle(inputs(0, jnp.float32, **sizes), options, "xla")


def test_batch_entries_and_heads_of_one_tile_are_strangers():
    """A NaN stays in its batch entry and head."""
    arrays = inputs(1, jnp.float32, B=3, Sq=20, H=2, D=8)
    run = outputs_and_gradients(lambda a: flash_attention(**a, return_lse=True, implementation="xla"))
    dirty = {name: x.at[1, :, 0].set(jnp.nan) for name, x in arrays.items()}
    results = (run(arrays), run(dirty))
    clean, dirty = ({"out": out, "lse": jnp.moveaxis(lse, 1, 2), **grads} for (out, lse), grads in results)
    for name, x in clean.items():
        assert jnp.isnan(dirty[name][1, :, 0]).all(), name
        assert jnp.array_equal(x[::2], dirty[name][::2]), name
        assert jnp.array_equal(x[1, :, 1], dirty[name][1, :, 1]), name

"""Causal, reverse and two-sided linear attention in chunks, every output and gradient against the float64 oracle."""

import jax.numpy as jnp
import pytest

from tests.linear.rule import DECAYS, assert_matches_oracle, inputs

HEADS = {
    "grouped": {"Hq": 4, "Hk": 2, "Hv": 2, "Dv": 5},
    "multi-query": {"Hq": 3, "Hk": 1, "Hv": 1},
    "grouped values": {"Hq": 2, "Hk": 2, "Hv": 6, "Dv": 11},
    "one key head": {"Hq": 1, "Hk": 1, "Hv": 4},
    "keys shared, values not": {"Hq": 4, "Hk": 1, "Hv": 4},
    "neither divides the other": {"Hq": 2, "Hk": 3, "Hv": 6, "B": 1},
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_with_state(decay, reverse):
    assert_matches_oracle(inputs(decay=decay, state=True), reverse=reverse, chunk_size=16)


@pytest.mark.parametrize("decay", DECAYS)
def test_normalized_with_state(decay):
    assert_matches_oracle(inputs(decay=decay, state=True, positive=True), normalize=True, chunk_size=16)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_both_sides(decay, normalize):
    arrays = inputs(decay=decay, positive=normalize)
    chunks = {} if decay is None else {"chunk_size": 16}
    assert_matches_oracle(arrays, causal=False, normalize=normalize, **chunks)


@pytest.mark.parametrize("heads", HEADS)
def test_heads_are_shared(heads):
    assert_matches_oracle(inputs(decay="token", state=True, **HEADS[heads]), chunk_size=16)


@pytest.mark.parametrize("heads", ["grouped", "grouped values"])
def test_heads_are_shared_on_both_sides(heads):
    assert_matches_oracle(inputs(decay="head", **HEADS[heads]), causal=False)
    assert_matches_oracle(inputs(Sk=33, **HEADS[heads]), causal=False)


@pytest.mark.parametrize("S", [1, 16, 17, 31, 64])
def test_lengths(S):
    assert_matches_oracle(inputs(S=S, decay="token", state=True, B=1), chunk_size=16)


@pytest.mark.parametrize("chunk_size", [16, 32, 128, None])
def test_chunk_sizes(chunk_size):
    assert_matches_oracle(inputs(S=140, decay="head", B=1), chunk_size=chunk_size)


@pytest.mark.parametrize(("D", "Dv"), [(1, 3), (3, 1), (40, 64)])
def test_head_dims(D, Dv):
    assert_matches_oracle(inputs(D=D, Dv=Dv, decay="head", state=True), chunk_size=16)


@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
def test_scale(scale):
    assert_matches_oracle(inputs(decay="head", state=True), scale=scale, chunk_size=16)


@pytest.mark.parametrize("Sk", [1, 33])
def test_all_keys_of_another_length(Sk):
    assert_matches_oracle(inputs(Sk=Sk), causal=False)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64], ids=lambda x: jnp.dtype(x).name)
@pytest.mark.parametrize("decay", DECAYS)
def test_dtypes(dtype, decay):
    assert_matches_oracle(inputs(dtype=dtype, decay=decay, state=True), chunk_size=16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda x: jnp.dtype(x).name)
def test_dtypes_of_other_forms(dtype):
    assert_matches_oracle(inputs(dtype=dtype, decay="head", state=True, positive=True), normalize=True, chunk_size=16)
    assert_matches_oracle(inputs(dtype=dtype, decay="token"), causal=False, chunk_size=16)
    assert_matches_oracle(inputs(dtype=dtype), causal=False)

"""Causal, reverse and two-sided linear attention in chunks, every output and gradient against the float64 oracle."""

import jax.numpy as jnp
import pytest

from tests.linear.rule import DECAYS, assert_matches_oracle, inputs

HEADS = {
    "grouped": {"Hq": 4, "Hk": 2, "Hv": 2, "Dv": 5},
    "grouped values": {"Hq": 2, "Hk": 2, "Hv": 6, "Dv": 11},
    "keys shared, values not": {"Hq": 4, "Hk": 1, "Hv": 4},
    "neither divides the other": {"Hq": 2, "Hk": 3, "Hv": 6, "B": 1},
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_with_state(decay, reverse):
    assert_matches_oracle(inputs(decay=decay, state=True), reverse=reverse, chunk_size=16)


@pytest.mark.parametrize("decay", [None, "token"])
def test_normalized_with_state(decay):
    assert_matches_oracle(inputs(decay=decay, state=True, positive=True), normalize=True, chunk_size=16)


@pytest.mark.parametrize(("decay", "normalize"), [(None, False), (None, True), ("head", False), ("token", True)])
def test_both_sides(decay, normalize):
    arrays = inputs(decay=decay, positive=normalize)
    chunks = {} if decay is None else {"chunk_size": 16}
    assert_matches_oracle(arrays, causal=False, normalize=normalize, **chunks)


@pytest.mark.parametrize("heads", HEADS)
def test_heads_are_shared(heads):
    assert_matches_oracle(inputs(decay="token", state=True, **HEADS[heads]), chunk_size=16)


def test_heads_are_shared_on_both_sides():
    assert_matches_oracle(inputs(decay="head", **HEADS["grouped values"]), causal=False)
    assert_matches_oracle(inputs(Sk=33, **HEADS["grouped"]), causal=False)


@pytest.mark.parametrize("S", [1, 16, 31])
def test_lengths(S):
    assert_matches_oracle(inputs(S=S, decay="token", state=True, B=1), chunk_size=16)


@pytest.mark.parametrize("chunk_size", [128, None])
def test_chunk_sizes(chunk_size):
    assert_matches_oracle(inputs(S=140, decay="head", B=1), chunk_size=chunk_size)


@pytest.mark.parametrize(("D", "Dv"), [(1, 3), (40, 64)])
def test_head_dims(D, Dv):
    assert_matches_oracle(inputs(D=D, Dv=Dv, decay="head", state=True), chunk_size=16)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale(scale):
    assert_matches_oracle(inputs(decay="head", state=True), scale=scale, chunk_size=16)


def test_all_keys_of_another_length():
    assert_matches_oracle(inputs(Sk=33), causal=False)


@pytest.mark.parametrize(
    ("dtype", "decay"),
    [("bfloat16", None), ("bfloat16", "head"), ("bfloat16", "token"), ("float16", "token"), ("float64", "token")],
)
def test_dtypes(dtype, decay):
    assert_matches_oracle(inputs(dtype=jnp.dtype(dtype), decay=decay, state=True), chunk_size=16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_normalized_in_16_bits(dtype):
    assert_matches_oracle(inputs(dtype=dtype, decay="head", state=True, positive=True), normalize=True, chunk_size=16)


@pytest.mark.parametrize("decay", [None, "token"])
def test_both_sides_in_bfloat16(decay):
    assert_matches_oracle(inputs(dtype=jnp.bfloat16, decay=decay), causal=False)

"""O(N) memory: what XLA allocates beside inputs and outputs. Everything is compiled, nothing runs."""

import math

import jax
import jax.numpy as jnp
import pytest

from jflash import flash_attention

B, H, D = 1, 8, 64
NAMES = ("q", "k", "v")


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def extra_bytes(direction, S, wrt=NAMES, implementation="xla", arrays=None, **options) -> int:
    arrays = {name: array(B, S, H, D) for name in NAMES} | (arrays or {})

    def forward(arrays):
        return flash_attention(**arrays, **options, implementation=implementation)

    def both(arrays):
        out, pull = jax.vjp(lambda some: forward({**arrays, **some}), {name: arrays[name] for name in wrt})
        return out, pull(out)

    function = {"forward": forward, "both": both}[direction]
    analysis = jax.jit(function).lower(arrays).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def score_matrix(S: int) -> int:
    return B * H * S * S * 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_an_eighth_of_the_score_matrix_at_16384(direction, causal):
    """Measured: 128 MB and 180 MB, of 8 GB."""
    assert extra_bytes(direction, 16384, causal=causal) < score_matrix(16384) / 8


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_linear_in_the_length(direction):
    four, eight, sixteen = (extra_bytes(direction, S) for S in (4096, 8192, 16384))
    assert eight < 2.2 * four
    assert sixteen < 2.2 * eight


def test_the_oracle_is_not():
    """So that the numbers above mean something."""
    assert extra_bytes("forward", 2048, implementation="reference") >= score_matrix(2048)


S = 4096
FEATURES = {
    "softcap": {"softcap": 2.0},
    "dropout": {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
    "window": {"window": (100, 10)},
    "alibi": {"arrays": {"alibi_slopes": array(H)}},
    "sinks": {"arrays": {"sinks": array(H)}, "wrt": (*NAMES, "sinks")},
    "segment_ids": {"arrays": {"segment_ids": array(B, S, dtype=jnp.int32)}},
    "mask": {"arrays": {"mask": array(1, 1, S, S, dtype=jnp.bool_)}},
    "bfloat16": {"arrays": {name: array(B, S, H, D, dtype=jnp.bfloat16) for name in NAMES}},
}


@pytest.mark.parametrize("name", FEATURES)
def test_no_feature_costs_a_score_matrix(name):
    assert extra_bytes("both", S, **FEATURES[name]) < score_matrix(S) / 4


@pytest.mark.parametrize("shape", [(1, H, 1, S), (1, H, S, 1), (1, 1, S, S), (S, S)], ids=str)
def test_gradient_of_a_broadcast_bias_is_reduced_as_it_comes(shape):
    """One more copy of the bias, at most, beside what the call needs without one."""
    plain = extra_bytes("both", S)
    found = extra_bytes("both", S, arrays={"bias": array(*shape)}, wrt=(*NAMES, "bias"))
    assert found - plain < 1.1 * 4 * math.prod(shape) + 2**20


def test_vmap_is_a_larger_batch():
    def forward(q, k, v):
        return flash_attention(q, k, v, implementation="xla")

    found = [
        jax.jit(f).lower(*[array(*shape)] * 3).compile().memory_analysis().temp_size_in_bytes
        for f, shape in ((forward, (4, S, H, D)), (jax.vmap(forward), (4, 1, S, H, D)))
    ]
    assert found[1] <= 1.1 * found[0]

"""Packed sequences in the Hopper kernels, in the interpreter: each query row has its own range of keys."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention_varlen
from pallas_kernels.parts import schedule
from tests.kernels.interpreted import hopper_on_the_cpu
from tests.kernels.test_attention import OLD
from tests.masks import blocks
from tests.varlen.rule import assert_follows, by_sequence, cu_seqlens, packed

pytestmark = pytest.mark.skipif(OLD, reason="slow on this JAX")
CASES = {
    "full": ((100, 1, 90, 65), (100, 1, 90, 65), dict(D=128, H=1, Hk=1), {}),
    "causal": ((130, 0, 126), (60, 5, 191), dict(D=128, H=2, Hk=1), dict(causal=True)),
    "window_D64": ((200, 184), (200, 184), dict(D=64, H=1, Hk=1), dict(causal=True, window=(50, None))),
    "mask_and_bias": (
        (100, 1, 90),
        (150, 0, 90),
        dict(D=64, H=2, Hk=1),
        dict(causal=True, mask=blocks(1, 2, 191, 240), bias=jnp.sin(jnp.arange(191.0 * 240).reshape(1, 1, 191, 240))),
    ),
    "unused_rows": ((40, 30), (200, 100), dict(D=64, H=2, Hk=2), dict(causal=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name):
    _assert_matches_oracle(name)


def test_a_cta_takes_several_tiles():
    with mock.patch.object(schedule, "SMS", 2):
        _assert_matches_oracle("causal")


def _assert_matches_oracle(name):
    q_lengths, k_lengths, shape, options = CASES[name]
    cu_q, cu_k = cu_seqlens(*q_lengths), cu_seqlens(*k_lengths)
    behind = 58 if name == "unused_rows" else 0
    arrays = packed(0, jnp.bfloat16, Tq=sum(q_lengths) + behind, Tk=sum(k_lengths) + behind, **shape)

    def ours(arrays):
        return flash_attention_varlen(
            **arrays, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options, return_lse=True, implementation="hopper"
        )

    def oracle(arrays):
        return by_sequence(**arrays, cu_q=np.asarray(cu_q), cu_k=np.asarray(cu_k), **options)

    with hopper_on_the_cpu():
        assert_follows(ours, oracle, arrays)


BEHIND = {"D64": ((20, 30), (30, 60), 64), "D128": ((90,), (128,), 128)}


@pytest.mark.parametrize("name", ["D64", pytest.param("D128", marks=pytest.mark.slow)])
def test_what_lies_behind_the_last_sequence_reaches_nothing(name):
    """NaN there, in the cotangent too, and the same bits but in dQ, which is summed in no fixed order."""
    (q_lengths, k_lengths, D), behind = BEHIND[name], 38
    cu_q, cu_k = cu_seqlens(*q_lengths), cu_seqlens(*k_lengths)
    used = {"q": sum(q_lengths), "k": sum(k_lengths), "v": sum(k_lengths), "out": sum(q_lengths)}
    arrays = packed(0, jnp.bfloat16, Tq=used["q"] + behind, Tk=used["k"] + behind, D=D, H=1, Hk=1)
    arrays["out"] = packed(1, jnp.bfloat16, Tq=used["q"] + behind, D=D, H=1, Hk=1)["q"]

    def run(arrays):
        call = functools.partial(flash_attention_varlen, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True)
        out, pull = jax.vjp(functools.partial(call, implementation="hopper"), *(arrays[name] for name in "qkv"))
        return dict(zip(("out", "dq", "dk", "dv"), (out, *pull(arrays["out"])), strict=True))

    with hopper_on_the_cpu():
        clean = run(arrays)
        found = run({name: x.at[used[name] :].set(jnp.nan) for name, x in arrays.items()})
    for name, x in found.items():
        np.testing.assert_allclose(x.astype(float), clean[name].astype(float), atol=1e-2 if name == "dq" else 0)
        assert (x[used[name[-1] if name != "out" else name] :] == 0).all()

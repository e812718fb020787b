"""Packed sequences in the Hopper kernels, in the interpreter: each query row has its own range of keys."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import _key_ranges, flash_attention_varlen
from jflash._arguments import bind
from pallas_kernels.hopper import attention_forward_plan
from pallas_kernels.parts import ranges, schedule
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
    "alibi": ((70, 0, 80), (90, 4, 60), dict(D=128, H=2, Hk=1), dict(alibi_slopes=jnp.array([0.3, 0.02]))),
    "alibi_of_each_D64": (
        (100, 1, 90),
        (150, 0, 90),
        dict(D=64, H=2, Hk=1),
        dict(causal=True, softcap=5.0, alibi_slopes=jnp.array([[0.3, 0.02], [1.0, 0.5], [0.1, 0.2]])),
    ),
    "alibi_D256": (
        (60, 70),
        (60, 100),
        dict(D=256, H=1, Hk=1),
        dict(deterministic=True, alibi_slopes=jnp.array([0.1])),
    ),
    "deterministic_D256": ((60, 0, 70), (60, 5, 100), dict(D=256, H=1, Hk=1), dict(causal=True, deterministic=True)),
    "unused_rows": ((40, 30), (200, 100), dict(D=64, H=2, Hk=2), dict(causal=True)),
}
SLOW = {"mask_and_bias", "full", "deterministic_D256", "alibi_of_each_D64", "alibi_D256"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
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


def tables(q_lengths, k_lengths, tokens, D=128, H=1, **options):
    """The problem, and for each query its first and last key."""
    shapes = [jax.ShapeDtypeStruct((1, n, H, D), jnp.bfloat16) for n in (tokens, tokens, tokens)]
    problem, _ = bind(*shapes, target="sm_90", **options)
    found, _ = _key_ranges.packed(problem, cu_seqlens(*q_lengths), cu_seqlens(*k_lengths))
    return dataclasses.replace(problem, left=None, right=None, key_ranges=True), found


@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window=(40, 20))], ids=str)
def test_tiles_visit_what_some_query_sees(options):
    """All of it and, outside of the first and the last such block, nothing; what is whole needs no mask."""
    q_lengths, k_lengths, rows, block = (100, 0, 60, 300, 5), (90, 30, 61, 200, 200), 64, 128
    problem, found = tables(q_lengths, k_lengths, 700, **options)
    first, last = np.asarray(found[0, :2])
    key = np.arange(700)
    seen = (first[:, None] <= key) & (key <= last[:, None])
    visits = ranges.table(found, rows, block, problem.Sk)
    visitors = np.asarray(ranges.visitors(visits, 6))[0]
    for n, (lo, full_lo, full_hi, hi) in enumerate(np.asarray(visits)[0]):
        of_rows = np.pad(seen[n * rows : (n + 1) * rows], ((0, 0), (0, 68)))
        by_block = of_rows.reshape(len(of_rows), 6, block)
        visited = np.flatnonzero(by_block.any(axis=(0, 2)))
        assert ((lo <= visited) & (visited < hi)).all()
        assert hi - lo <= (visited.max() + 1 - visited.min() if visited.size else 0)
        assert by_block[:, full_lo:full_hi].all()
        assert all(low <= n < high for low, high in visitors[lo:hi])
    assert (visits[0, -2:, 0] == visits[0, -2:, 3]).all()  # behind the last sequence


@pytest.mark.parametrize("causal", [True, False])
def test_persistent_ctas_are_busy(causal):
    """Tiles of 16k tokens in sequences of very different lengths, each dealt once, and to all CTAs about as much."""
    lengths = np.diff([0, 911, 4879, 6137, 7683, 9203, 12185, 14519, 16384])
    problem, found = tables(lengths, lengths, 16384, H=16, causal=causal)
    plan = attention_forward_plan.make_plan(problem)
    visits = ranges.table(found, plan.tile.rows, plan.tile.block_kv, problem.Sk)
    steps = np.sort(np.asarray(visits[0, :, 3] - visits[0, :, 0]))[::-1]
    dealt = [[plan.schedule.work(jnp.int32(n)) for n in cta if n >= 0] for cta in plan.table]
    assert sorted((int(x.h), int(x.block)) for cta in dealt for x in cta) == [
        (h, n) for h in range(16) for n in range(128)
    ]
    busy = np.array([sum(1 + steps[int(x.block)] for x in cta) for cta in dealt])
    assert busy.mean() >= 0.95 * busy.max()


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

"""The Hopper kernels of linear attention in the interpreter: numbers, barriers and races; and what ptxas says."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from jflash import LinearAttentionState, linear_attention, linear_attention_step
from pallas_kernels import linear_tiles
from pallas_kernels.hopper import linear, linear_calls, linear_plan, linear_split
from pallas_kernels.problem import LinearProblem
from tests.kernels.calls import on_hopper
from tests.kernels.h100 import compile_for_h100
from tests.kernels.interpreted import interpreted
from tests.linear.rule import assert_matches_oracle, inputs


@contextlib.contextmanager
def on_the_cpu():
    """With the tiles of heads that fill the GPU: of some, two consumers share a CTA's loads."""
    with mock.patch.object(linear_tiles, "SMS", 0), interpreted((linear_calls, "forward"), (linear_calls, "backward")):
        yield


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
OLD = jax.__version_info__ < (0, 11)
CASES = {
    "plain": (dict(S=128, D=64), {}),
    "head": (dict(S=80, Hq=4, D=64, decay="head"), {}),
    "token": (dict(S=200, D=128, decay="token", state=True), {}),
    "reverse": (dict(S=200, D=64, decay="token", strength=0.1, state=True), dict(reverse=True)),
    "weak": (dict(S=320, D=64, decay="token", strength=0.02), {}),
    "strong": (dict(S=130, D=64, decay="token", strength=30.0), {}),
    "grouped": (dict(S=100, Hq=4, Hk=2, D=64, decay="head"), {}),
    "shared_values": (dict(S=70, Hq=1, Hk=1, Hv=2, D=64, decay="token", state=True), {}),
    "head_dims": (dict(S=90, D=40, Dv=100, decay="head", state=True), dict(scale=-1.5)),
    "short": (dict(B=2, S=3, D=64, decay="token"), {}),
    "D256": (dict(S=65, D=256, decay="head"), {}),
    "normalized_plain": (dict(S=70, D=64, positive=True), dict(normalize=True)),
    "normalized": (dict(S=100, D=64, decay="token", state=True, positive=True), dict(normalize=True)),
    "normalized_grouped": (dict(S=70, Hq=2, Hk=1, D=100, Dv=64, positive=True), dict(normalize=True)),
    "full": (dict(S=70, Sk=130, D=64), dict(causal=False)),
    "full_grouped": (dict(S=70, Sk=40, Hq=2, Hk=1, D=64, Dv=100), dict(causal=False)),
    "full_normalized": (dict(S=70, Sk=100, D=64, positive=True), dict(causal=False, normalize=True)),
    "both_ways": (dict(S=130, D=64, decay="token", strength=0.1), dict(causal=False)),
    "both_ways_normalized": (dict(S=70, D=64, decay="head", positive=True), dict(causal=False, normalize=True)),
}
QUICK = ("plain",) if OLD else ("plain", "token", "reverse", "full")
PACKED = {
    "plain": ({}, {}),
    "token": (dict(decay="token", strength=0.1), {}),
    "head_reverse": (dict(Hq=4, Hk=1, decay="head", strength=0.1), dict(reverse=True)),
    "normalized": (dict(decay="token", positive=True), dict(normalize=True)),
    "both_ways": (dict(decay="token", strength=0.1), dict(causal=False)),
    "both_ways_plain": (dict(positive=True), dict(causal=False, normalize=True)),
}


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CASES])
def test_matches_oracle(name):
    shape, options = CASES[name]
    with on_the_cpu():
        assert_matches_oracle(inputs(0, jnp.bfloat16, **{"B": 1, "Hq": 1, **shape}), "hopper", **options)


@pytest.mark.skipif(OLD, reason="slow on this JAX")
@pytest.mark.parametrize("name", [name if name == "token" else slow(name) for name in PACKED])
def test_packed(name):
    """Sequences of one token, of none, across chunks, and NaN behind the last."""
    shape, options = PACKED[name]
    arrays = inputs(3, jnp.bfloat16, **{"B": 1, "S": 150, "Hq": 1, "D": 64, **shape})
    options |= {"cu_seqlens": jnp.asarray([0, 1, 2, 40, 40, 100, 140])}

    def attend(**arguments):
        there = (x for x in ("q", "k", "v", "log_decay") if getattr(arguments.get(x), "ndim", 1) > 1)
        return linear_attention(**arguments | {x: arguments[x].at[:, 140:].set(jnp.nan) for x in there})

    with on_the_cpu():
        assert_matches_oracle(arrays, "hopper", attend, return_state=False, **options)


@pytest.mark.skipif(OLD, reason="slow on this JAX")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (dict(Hq=2, Hk=1, decay="token", state=True, strength=0.05), {}),
        slow(dict(B=2, Hq=1, decay="token", strength=0.05), dict(reverse=True)),
        slow(dict(Hq=4, decay="head"), {}),
        slow(dict(S=300, Hq=1, decay="token", strength=0.05, state=True), {}),
        slow(dict(B=2, S=500, Hq=1), dict(reverse=True)),
    ],
    ids=str,
)
def test_segments_of_time(shape, options):
    arrays = inputs(2, jnp.bfloat16, **{"B": 1, "Hq": 1, "S": 256, "D": 64, **shape})
    small = mock.patch.object(linear_split, "_SHORTEST", 2), mock.patch.object(linear_split, "SMS", 4)
    with small[0], small[1], on_the_cpu():
        assert_matches_oracle(arrays, "hopper", **options)


@pytest.mark.skipif(OLD, reason="slow on this JAX")
def test_a_decay_of_nothing_forgets():
    """-inf is no NaN, and what was before leaves no trace."""
    arrays = inputs(1, jnp.bfloat16, B=1, S=100, Hq=1, D=64, decay="token")
    forgetful = arrays | {"log_decay": arrays["log_decay"].at[:, 70].set(-jnp.inf)}
    later = {name: x[:, 70:] for name, x in forgetful.items()}
    with on_the_cpu():
        out = linear_attention(**forgetful, implementation="hopper")[:, 70:]
        alone = linear_attention(**later, implementation="hopper")
    assert jnp.abs(out - alone).max() <= 0.02 * jnp.abs(alone).max()


def test_every_column_of_v_has_a_consumer():
    for D, Dv, H in itertools.product((64, 128, 192, 256), (64, 128, 192, 256), (1, 200)):
        plan = linear_plan.make_plan(linear_plan.Scan(B=1, H=H, S=64, D=D, Dv=Dv, dtype="bfloat16", scale=1.0))
        assert plan.slices * plan.tile.warpgroups * 64 == Dv


@pytest.mark.parametrize(
    ("B", "H", "D", "warpgroups", "segments"),
    [(2, 16, 128, 1, 2), (1, 64, 128, 1, 1), (1, 67, 128, 2, 1), (8, 32, 128, 2, 1), (1, 4, 128, 1, 16)],
)
def test_few_heads_fill_the_gpu(B, H, D, warpgroups, segments):
    """By consumers with a CTA of their own, then by segments of time."""
    scan = linear_plan.Scan(B=B, H=H, S=16384, D=D, Dv=D, dtype="bfloat16", scale=1.0)
    assert linear_plan.make_plan(scan).tile.warpgroups == warpgroups
    assert linear_split.segments(scan) == segments


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(dtype="float16"), "dtype=float16"),
        (dict(D=300), "head_dim=300"),
        (dict(chunk_size=128), "chunk_size=128"),
        (dict(sequences=2), "return_state with cu_seqlens"),
        (dict(sequences=2, initial_state=True, final_state=False), "initial_state with cu_seqlens"),
        (dict(scale=0.0), "scale=0.0"),
    ],
    ids=str,
)
def test_names_what_it_cannot_do(changed, reason):
    p = LinearProblem("sm_90", "bfloat16", B=1, H=1, Hq=1, Hk=1, Hv=1, Sq=64, Sk=64, D=64, Dv=64, scale=1.0)
    assert linear.why_not(p, "forward") is None
    assert reason in linear.why_not(dataclasses.replace(p, **changed), "forward")


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (dict(S=1000, D=128, decay="token", state=True), {}),
        (dict(S=1024, D=64, decay="head"), {}),
        (dict(S=100, D=64, decay="head", positive=True), dict(causal=False, normalize=True, cu_seqlens=jnp.arange(3))),
        (dict(S=100, D=64), dict(causal=False)),
    ],
    ids=str,
)
def test_lowers(shape, options):
    """For a GPU, which needs none: shapes, layouts and the API of this JAX are right."""
    arrays = inputs(0, jnp.bfloat16, B=1, Hq=2, **shape)
    attend = functools.partial(linear_attention, implementation="hopper", **options)
    with on_hopper():
        run = jax.jit(lambda arrays: jax.vjp(lambda a: attend(**a), arrays)[1](arrays["v"]))
        text = run.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @mosaic_gpu" in text


@pytest.mark.compile
@pytest.mark.parametrize("decay", [None, "token"])
@pytest.mark.parametrize(
    ("D", "H", "S", "expected"), [(64, 2, 900, 4), (128, 80, 900, 4), (256, 2, 900, 4), (128, 2, 1100, 7)]
)
def test_ptxas_has_no_complaint(D, H, S, expected, decay):
    arrays = inputs(0, jnp.bfloat16, B=1, S=S, Hq=H, D=D, decay=decay, state=True)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)

    def run(arrays):
        results, pull = jax.vjp(lambda a: linear_attention(**a, return_state=True, implementation="hopper"), arrays)
        return pull(results)

    with on_hopper():
        _, kernels = compile_for_h100(run, shapes)
    tile = linear_tiles.scan_tile(H, D, D)
    assert len(kernels) == expected  # 3 more find what enters segments of time
    for kernel in kernels:
        assert kernel.serialized is None
        assert kernel.spill_bytes <= tile.spill_bytes
        assert kernel.registers * 128 * (tile.warpgroups + 1) <= 65536 // tile.ctas


@pytest.mark.compile
def test_a_step_is_one_pass_over_the_state():
    """One instruction reads it, and writes it without a copy if it is donated."""
    token, state = jax.ShapeDtypeStruct((8, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((8, 4, 64, 64), jnp.float32)

    def step(q, k, v, g, kv):
        out, after = linear_attention_step(q, k, v, LinearAttentionState(kv), log_decay=g)
        return out, after.kv

    decay = jax.ShapeDtypeStruct((4,), jnp.float32)
    compiled, _ = compile_for_h100(step, token, token, token, decay, state, donated=(4,))
    text = str(compiled.as_text())
    lines = [line.split("metadata")[0] for line in text[text.index("ENTRY") :].splitlines()]
    assert len([line for line in lines if re.search(r"= .*(fusion|copy|custom-call)\(.*%kv", line)]) == 1
    assert not [line for line in lines if " copy(" in line]
    assert "{1}: (4" in text

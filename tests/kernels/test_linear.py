"""The Hopper kernels of linear attention in the interpreter: numbers, barriers and races; and what ptxas says."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from jflash import linear_attention
from pallas_kernels import linear_tiles
from pallas_kernels.hopper import linear, linear_gradients, linear_scan, linear_split
from pallas_kernels.problem import LinearProblem
from tests.kernels import interpreter
from tests.kernels.calls import on_hopper
from tests.kernels.h100 import compile_for_h100
from tests.linear.rule import assert_matches_oracle, inputs


@contextlib.contextmanager
def interpreted():
    """Fails on a race, also where JAX only records it."""
    params = interpreter.params()
    interpreter.reset()
    jax.clear_caches()
    with contextlib.ExitStack() as patches:
        for name in ("linear_forward", "linear_gradients"):
            call = functools.partial(getattr(linear_gradients, name), interpret=params)
            patches.enter_context(mock.patch.object(linear_gradients, name, call))
        patches.enter_context(on_hopper())
        yield
    jax.clear_caches()
    assert not interpreter.found_races(), "the race detector found a race"


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
}
QUICK = ("plain",) if OLD else ("plain", "head", "token", "reverse")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CASES])
def test_matches_oracle(name):
    shape, options = CASES[name]
    with interpreted():
        assert_matches_oracle(inputs(0, jnp.bfloat16, **{"B": 1, "Hq": 1, **shape}), "hopper", **options)


@pytest.mark.skipif(OLD, reason="slow on this JAX")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (dict(Hq=2, Hk=1, decay="token", state=True, strength=0.05), {}),
        slow(dict(B=2, Hq=1, decay="token", strength=0.05), dict(reverse=True)),
        slow(dict(Hq=4, decay="head"), {}),
        slow({}, {}),
    ],
    ids=str,
)
def test_segments_of_time(shape, options):
    arrays = inputs(2, jnp.bfloat16, **{"B": 1, "Hq": 1, "S": 256, "D": 64, **shape})
    with mock.patch.object(linear_split, "_SHORTEST", 2), mock.patch.object(linear_split, "SMS", 4), interpreted():
        assert_matches_oracle(arrays, "hopper", **options)


@pytest.mark.skipif(OLD, reason="slow on this JAX")
def test_a_decay_of_nothing_forgets():
    """-inf is no NaN, and what was before leaves no trace."""
    arrays = inputs(1, jnp.bfloat16, B=1, S=100, Hq=1, D=64, decay="token")
    forgetful = arrays | {"log_decay": arrays["log_decay"].at[:, 70].set(-jnp.inf)}
    later = {name: x[:, 70:] for name, x in forgetful.items()}
    with interpreted():
        out = linear_attention(**forgetful, implementation="hopper")[:, 70:]
        alone = linear_attention(**later, implementation="hopper")
    assert jnp.abs(out - alone).max() <= 0.02 * jnp.abs(alone).max()


def test_every_column_of_v_has_a_consumer():
    for D, Dv in itertools.product((64, 128, 192, 256), repeat=2):
        plan = linear_scan.make_plan(linear_scan.Scan(B=1, H=1, S=64, D=D, Dv=Dv, dtype="bfloat16", scale=1.0), False)
        assert plan.slices * plan.tile.warpgroups * 64 == Dv


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(dtype="float16"), "dtype=float16"),
        (dict(D=300), "head_dim=300"),
        (dict(chunk_size=128), "chunk_size=128"),
        (dict(normalize=True), "normalize"),
        (dict(sequences=2), "cu_seqlens"),
        (dict(after=True), "causal=False"),
        (dict(mask_shape=(1, 1, 64, 64)), "mask"),
        (dict(scale=0.0), "scale=0.0"),
    ],
    ids=str,
)
def test_names_what_it_cannot_do(changed, reason):
    p = LinearProblem("sm_90", "bfloat16", B=1, H=1, Hq=1, Hk=1, Hv=1, Sq=64, Sk=64, D=64, Dv=64, scale=1.0)
    assert linear.why_not(p, "forward") is None
    assert reason in linear.why_not(dataclasses.replace(p, **changed), "forward")


@pytest.mark.compile
@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs jax-cuda13-plugin")
@pytest.mark.parametrize("decay", [None, "token"])
@pytest.mark.parametrize(("D", "S", "expected"), [(64, 1000, 4), (128, 1000, 4), (256, 1000, 4), (128, 1024, 7)])
def test_ptxas_has_no_complaint(D, S, expected, decay):
    arrays = inputs(0, jnp.bfloat16, B=1, S=S, Hq=2, D=D, decay=decay, state=True)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)

    def run(arrays):
        results, pull = jax.vjp(lambda a: linear_attention(**a, return_state=True, implementation="hopper"), arrays)
        return pull(results)

    with on_hopper():
        _, kernels = compile_for_h100(run, shapes)
    tile = linear_tiles.SCAN[D]
    assert len(kernels) == expected  # 3 more find what enters segments of time
    for kernel in kernels:
        assert kernel.serialized is None
        assert kernel.spill_bytes <= tile.spill_bytes
        assert kernel.registers * 128 * (tile.warpgroups + 1) <= 65536 // tile.ctas

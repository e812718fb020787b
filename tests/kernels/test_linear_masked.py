"""The Hopper kernels of masked linear attention, interpreted: numbers, barriers and races; and what ptxas says."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import linear_attention
from pallas_kernels import masked_tiles
from pallas_kernels.hopper import linear, linear_masked, linear_masked_gradient
from pallas_kernels.parts import schedule
from pallas_kernels.parts.shared_mask import Sharing
from pallas_kernels.problem import LinearProblem
from tests.kernels.calls import on_hopper
from tests.kernels.h100 import compile_for_h100
from tests.kernels.interpreted import interpreted
from tests.linear.rule import assert_matches_oracle, inputs


@contextlib.contextmanager
def on_the_cpu():
    """A CTA takes more than one tile."""
    with (
        mock.patch.object(schedule, "SMS", 1),
        mock.patch.object(linear_masked_gradient, "_MOST_PARTS", 2),
        interpreted((linear_masked, "forward"), (linear_masked, "backward")),
    ):
        yield


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
OLD = jax.__version_info__ < (0, 11)
CASES = {
    "whole_tiles": (dict(B=1, S=128, Sk=256, Hq=1, D=64, mask=(1, 1, 128, 256)), {}),
    "two_heads": (dict(B=1, S=136, Hq=2, D=64, mask=(1, 1, 136, 136)), {}),
    "float32_mask": (dict(B=1, S=72, Sk=136, Hq=1, D=128, mask=(1, 1, 72, 136)), dict(scale=-0.5)),
    "ragged": (dict(B=2, S=141, Sk=75, Hq=3, D=64, mask=(2, 1, 141, 75)), {}),
    "of_heads": (dict(B=2, S=130, Hq=2, D=64, mask=(1, 2, 130, 130)), {}),
    "D128": (dict(B=1, S=130, Hq=1, D=128, mask=(1, 1, 130, 130)), {}),
    "of_each": (dict(B=2, S=136, Hq=2, D=64, mask=(2, 2, 136, 136)), {}),
    "grouped": (dict(B=1, S=72, Hq=4, Hk=2, Hv=4, D=64, mask=(1, 1, 72, 72)), {}),
    "head_dims": (dict(B=1, S=90, Hq=2, D=40, Dv=56, mask=(1, 2, 90, 90)), {}),
    "one_token": (dict(B=2, S=1, Sk=3, Hq=2, D=64, mask=(1, 1, 1, 3)), {}),
}
QUICK = () if OLD else ("two_heads", "float32_mask")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CASES])
def test_matches_oracle(name):
    shape, options = CASES[name]
    arrays = inputs(0, jnp.bfloat16, **shape)
    if name == "float32_mask":
        arrays["mask"] = arrays["mask"].astype(jnp.float32)
    with on_the_cpu():
        assert_matches_oracle(arrays, "hopper", **options)


@pytest.mark.slow
def test_boolean_mask_and_float16():
    arrays = inputs(0, jnp.float16, B=1, S=72, Hq=2, D=64)
    arrays["mask"] = jnp.asarray(np.random.default_rng(1).random((1, 2, 72, 72)) < 0.6)
    with on_the_cpu():
        assert_matches_oracle(arrays, "hopper")


@pytest.mark.parametrize("of_batch", [1, 3])
@pytest.mark.parametrize("of_heads", [1, 4])
def test_every_entry_reads_its_mask_once(of_batch, of_heads):
    shared = Sharing(3, 4, of_batch, of_heads)
    found = set()
    for m in range(shared.masks):
        b, h = shared.mask(m)
        for n in range(shared.each):
            entry = tuple(map(int, shared.entry(jnp.int32(m), jnp.int32(n))))
            assert (int(b), int(h)) == (entry[0] % of_batch, entry[1] % of_heads)
            found.add(entry)
    assert len(found) == 12


def test_few_tiles_are_cut_into_parts():
    parts = linear_masked_gradient._parts
    assert parts(64, 192) == 2  # 128 CTAs of 132 in place of 64
    assert parts(4096, 64) == 1
    assert parts(1, 7) == 7
    assert parts(1, 1) == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(target="sm_80"), "target=sm_80"),
        (dict(dtype="float32"), "dtype=float32"),
        (dict(D=192, Dv=192), "head_dim=192"),
        (dict(D=64, Dv=128), "one multiple of 64"),
        (dict(normalize=True), "normalize"),
        (dict(mask_shape=(1, 1, 1, 64)), "mask lengths (1, 64)"),
    ],
    ids=str,
)
def test_names_what_it_cannot_do(changed, reason):
    p = LinearProblem("sm_90", "bfloat16", B=1, H=1, Hq=1, Hk=1, Hv=1, Sq=64, Sk=64, D=64, Dv=64, scale=1.0, after=True)
    p = dataclasses.replace(p, mask_shape=(1, 1, 64, 64))
    with on_hopper():
        assert linear.why_not(p, "forward") is None
        assert reason in linear.why_not(dataclasses.replace(p, **changed), "forward")


SHAPES = {
    "D64": dict(B=2, S=1024, Hq=4, D=64, mask=(1, 1, 1024, 1024)),
    "D64_of_each": dict(B=2, S=1024, Hq=4, D=64, mask=(2, 4, 1024, 1024)),
    "D64_ragged": dict(B=2, S=1001, Hq=4, D=64, mask=(1, 1, 1001, 1001)),
    "D128": dict(B=2, S=1024, Hq=4, D=128, mask=(1, 1, 1024, 1024)),
    "D128_ragged": dict(B=2, S=1001, Hq=4, D=128, mask=(2, 4, 1001, 1001)),
}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "mask_dtype"),
    [*((name, "bfloat16") for name in SHAPES), ("D64_ragged", "float32"), ("D128", "float32")],
)
def test_ptxas_has_no_complaint(name, mask_dtype):
    arrays = inputs(0, jnp.bfloat16, **SHAPES[name])
    arrays["mask"] = arrays["mask"].astype(mask_dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)

    def run(arrays):
        out, pull = jax.vjp(lambda a: linear_attention(**a, implementation="hopper"), arrays)
        return out, pull(out)

    with on_hopper():
        _, kernels = compile_for_h100(run, shapes)
    key = shapes["q"].shape[3], jnp.dtype(mask_dtype).itemsize
    allowed = {
        "linear_masked_forward": masked_tiles.FORWARD[key].spill_bytes,
        "linear_masked_backward": masked_tiles.BACKWARD[key].spill_bytes,
        "linear_masked_gradient": masked_tiles.GRADIENT[key[0]].spill_bytes,
        "attention_dq": 0,
    }
    assert {kernel.name for kernel in kernels} == allowed.keys()
    for kernel in kernels:
        assert kernel.serialized is None, kernel.name
        assert kernel.spill_bytes <= allowed[kernel.name], kernel.name
        assert kernel.registers * 128 * 3 <= 65536, kernel.name


@pytest.mark.compile
def test_weights_are_not_stored():
    B, S, H = 4, 2048, 8
    q, mask = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((B, S, H, 64), (1, 1, S, S)))

    def run(q, k, v, mask, d_out):
        return jax.vjp(lambda *x: linear_attention(*x[:3], mask=x[3], implementation="hopper"), q, k, v, mask)[1](d_out)

    with on_hopper():
        compiled, _ = compile_for_h100(run, q, q, q, mask, q)
    assert compiled.memory_analysis().temp_size_in_bytes < B * S * H * 64 * 4 + S * S * 4  # dQ in float32, one dM

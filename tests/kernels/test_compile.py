"""Compiles each kernel for an H100 and holds ptxas to the tile table: spills, registers, no serialized wgmma."""

import dataclasses
import importlib
import importlib.metadata
import sys
from unittest import mock

import pytest

from pallas_kernels import hopper, tiles
from tests.kernels import planted
from tests.kernels.calls import CALLS, cases, forward_and_backward, on_hopper, shapes
from tests.kernels.h100 import Kernel, compile_for_h100

pytestmark = pytest.mark.compile
REGISTERS = 65536  # of an SM
MORE_SPILLS = {"D64_dropout": 28}  # bytes that a feature may spill beyond its tile's


def compiled(shape: dict, options: dict) -> dict[str, Kernel]:
    with on_hopper():
        _, kernels = compile_for_h100(forward_and_backward(options), *shapes(**shape))
    return {kernel.name: kernel for kernel in kernels}


def complaints(shape: dict, options: dict, kernels: dict[str, Kernel], more_spills: int = 0) -> list[str]:
    """Where the kernels break the promises of their tiles."""
    D = tiles.padded(shape["D"])
    with_bias = "bias" in shape
    forward = (tiles.FORWARD_WITH_BIAS if with_bias else tiles.FORWARD)[D]
    backward = (tiles.BACKWARD_WITH_BIAS if with_bias else tiles.BACKWARD)[D]
    if "sequences" in options:
        table = tiles.BACKWARD_WITH_POSITIONS if "alibi_slopes" in options else tiles.BACKWARD_CROWDED
        backward = table[D]
    limits = {  # bytes to spill, warpgroups
        "attention_forward": (forward.spill_bytes, forward.warpgroups + 1),
        "attention_backward": (backward.spill_bytes, 3),
        "attention_backward_roles": (backward.spill_bytes, 3),
        "attention_backward_q": (0, 3),
        "attention_delta": (0, 1),
        "attention_dq": (0, 4 if backward.roles else 2),
    }
    assert {
        "attention_forward",
        "attention_backward_roles" if backward.roles else "attention_backward",
    } <= kernels.keys()
    assert kernels.keys() <= limits.keys()
    found = []
    for name, kernel in kernels.items():
        spill_bytes, warpgroups = limits[name]
        if kernel.serialized:
            found.append(f"{name}: {kernel.serialized}")
        if kernel.spill_bytes > spill_bytes + more_spills:
            found.append(f"{name}: spills {kernel.spill_bytes} bytes, its tile allows {spill_bytes}")
        if kernel.registers * warpgroups * 128 > REGISTERS:
            found.append(f"{name}: {kernel.registers} registers for {warpgroups} warpgroups")
    return found


@pytest.mark.parametrize("name", cases())
def test_ptxas_has_no_complaint(name):
    shape, options = CALLS[name]
    assert complaints(shape, options, compiled(shape, options), MORE_SPILLS.get(name, 0)) == []


def test_notices_a_tile_that_spills():
    greedy = {**tiles.FORWARD, 64: dataclasses.replace(tiles.FORWARD[64], registers=128)}
    shape = dict(D=64, S=1920)  # of its own: JAX keeps what it traced for the others
    with mock.patch.object(tiles, "FORWARD", greedy):
        kernels = compiled(shape, {})
    assert any("spills" in complaint for complaint in complaints(shape, {}, kernels))


def test_notices_serialized_wgmma(monkeypatch):
    """A product under a condition, which ptxas cannot keep in flight."""
    original = importlib.import_module(planted.FORWARD)
    monkeypatch.setitem(sys.modules, planted.FORWARD, original)
    monkeypatch.setattr(hopper, "attention_forward", original)
    planted.plant(
        planted.FORWARD,
        "running = tma.product(o_acc, carry.weights, refs.v_smem, v_slot)",
        "running = 1; pl.when(step > 1)(lambda: [tma.product(o_acc, carry.weights, refs.v_smem, v_slot), None][1])",
    )
    shape = dict(D=128, S=2176)
    assert any("C75" in complaint for complaint in complaints(shape, {}, compiled(shape, {})))

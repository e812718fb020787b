"""Calls over four devices, in processes that have them: see sharded.py and ring.py."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jflash.parallel import ring_attention, zigzag_order
from tests.frameworks import ring
from tests.frameworks.sharded import CASES
from tests.frameworks.test_transforms import python

QUICK = ("everything/BH/explicit", "dropout/H/auto", "linear/BH/auto", "cache/B/auto")


def run(module: str, *chosen: str) -> None:
    done = python("-m", f"tests.frameworks.{module}", *chosen, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name}: equal" for name in chosen]


def test_calls():
    run("sharded", *QUICK)


def test_ring():
    run("ring", "causal")


def test_ring_refuses():
    x, odd = (jnp.zeros((1, n, 2, 8)) for n in (6, 5))
    with pytest.raises(ValueError, match="chunks of q and k, 6 and 5 long, must be equal with causal=True"):
        ring_attention(x, odd, odd, axis_name="s", causal=True)
    with pytest.raises(ValueError, match="zigzag with causal=False and chunks 6 long needs causal=True"):
        ring_attention(x, x, x, axis_name="s", zigzag=True)
    with pytest.raises(ValueError, match="chunks 5 long needs causal=True and an even length"):
        ring_attention(odd, odd, odd, axis_name="s", causal=True, zigzag=True)
    with pytest.raises(ValueError, match="length=12 must be a multiple of 2 devices=8"):
        zigzag_order(12, 4)
    with pytest.raises(NameError, match="s"):
        ring_attention(x, x, x, axis_name="s")
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


@pytest.mark.slow
def test_every_ring():
    run("ring", *ring.CASES)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "explicit", "shard_map"])
@pytest.mark.parametrize("axes", ["B", "H", "BH"])
def test_every_case(axes, way):
    left_out = {"shard_map": ["dropout", "groups"], "explicit": ["groups"], "auto": []}[way]
    run("sharded", *(f"{name}/{axes}/{way}" for name in CASES if name not in left_out))

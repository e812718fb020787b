"""Calls over four devices, in processes that have them: see sharded.py and ring.py."""

from __future__ import annotations

import pytest

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


@pytest.mark.slow
def test_every_ring():
    run("ring", *ring.CASES)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "explicit", "shard_map"])
@pytest.mark.parametrize("axes", ["B", "H", "BH"])
def test_every_case(axes, way):
    run("sharded", *(f"{name}/{axes}/{way}" for name in CASES if (name, way) != ("dropout", "shard_map")))

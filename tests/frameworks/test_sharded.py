"""Calls over four devices, in a process that has them: see sharded.py."""

from __future__ import annotations

import pytest

from tests.frameworks.sharded import CASES
from tests.frameworks.test_transforms import python

QUICK = ("everything", "dropout", "linear")


def run(placement: str, *cases: str) -> None:
    flags = "--xla_force_host_platform_device_count=4"
    done = python("-m", "tests.frameworks.sharded", placement, *cases, XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name}: equal" for name in cases]


def test_batch_and_heads_on_a_mesh():
    run("both", *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["batch", "heads", "both"])
def test_split(placement):
    run(placement, *CASES)

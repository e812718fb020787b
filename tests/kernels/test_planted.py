"""Planted bugs: what the interpreted tests check would notice each of them."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.kernels.planted import BUGS

ROOT = Path(__file__).parents[2]
PATIENCE = 150  # seconds; a run takes about ten, and one that hangs has been noticed
SEES_RACES = jax.__version_info__ >= (0, 12)
# What the others show too.
SLOW = {
    "forward_old_sum_not_faded",
    "backward_delta_dropped",
    "forward_slot_refilled_early",
    "backward_q_released_early",
    "forward_k_not_awaited",
    "forward_output_not_fenced",
}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in BUGS])
def test_is_noticed(name):
    if not SEES_RACES and not BUGS[name].numbers:
        pytest.skip("needs the race detector of JAX 0.12")
    command = [sys.executable, "-m", "tests.kernels.planted", name]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return
    assert run.returncode != 0, f"{name} went unnoticed"
    assert run.returncode != 2, run.stderr
    noticed = ("RACE DETECTED", "found a race", "AssertionError", "barrier", "arrivals")
    assert any(word in run.stderr for word in noticed), f"{name} stopped for another reason:\n{run.stderr[-2000:]}"

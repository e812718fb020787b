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


@pytest.mark.parametrize("name", BUGS)
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

"""Without torch there is nothing here to test."""

import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]


@pytest.fixture
def exact_lengths(monkeypatch):
    """Calls run as they are, whatever lengths came before: their bits are JAX's."""
    monkeypatch.setenv("JFLASH_EXACT_LENGTHS", "1")

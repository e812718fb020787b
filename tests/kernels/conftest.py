"""Tests marked `compile` need the wheels that `make test-compile` installs, and are skipped without them."""

import importlib.metadata

import pytest

WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")


def pytest_collection_modifyitems(items):
    missing = [wheel for wheel in WHEELS if not _is_installed(wheel)]
    reason = f"needs the wheels {', '.join(missing)}; `make test-compile` installs them"
    for item in items:
        if missing and item.get_closest_marker("compile"):
            item.add_marker(pytest.mark.skip(reason=reason))


def _is_installed(wheel: str) -> bool:
    try:
        return bool(importlib.metadata.version(wheel))
    except importlib.metadata.PackageNotFoundError:
        return False

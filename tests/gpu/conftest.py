"""Everything here needs an NVIDIA Hopper GPU: `python -m pytest tests/gpu` on one."""

import jax
import pytest


def _why_not() -> str | None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"needs an NVIDIA Hopper GPU, JAX's default device is {device}"
    capability = getattr(device, "compute_capability", "unknown")
    return None if capability == "9.0" else f"needs compute capability 9.0, this GPU has {capability}"


def pytest_collection_modifyitems(items):
    here = [item for item in items if "/gpu/" in str(item.path)]
    reason = _why_not() if here else None
    for item in here if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))

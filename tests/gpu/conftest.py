"""Everything here needs an NVIDIA Hopper GPU: `python -m pytest tests/gpu` on one."""

import jax
import pytest

from pallas_kernels import hopper


def _why_not() -> str | None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"needs an NVIDIA Hopper GPU, JAX's default device is {device}"
    capability = getattr(device, "compute_capability", "unknown")
    return None if capability == "9.0" else f"needs compute capability 9.0, this GPU has {capability}"


@pytest.fixture
def unproven(monkeypatch):
    """Lets the kernels take what they are not trusted with before it has passed here."""
    monkeypatch.setattr(hopper, "unproven", lambda p, direction: None)


def pytest_collection_modifyitems(items):
    here = [item for item in items if "/gpu/" in str(item.path)]
    reason = _why_not() if here else None
    for item in here if reason else ():
        item.add_marker(pytest.mark.skip(reason=reason))

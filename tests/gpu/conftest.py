"""Everything here needs an NVIDIA Hopper GPU: `python -m pytest tests/gpu` on one.

Tests marked proves(feature, ...) run as if a GPU had run all of `pallas_kernels/unproven.py` before; at the end
stands which of those features may leave that set. `-m proves` runs them alone.
"""

from collections import Counter
from unittest import mock

import jax
import pytest

from pallas_kernels import unproven


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


@pytest.fixture(autouse=True)
def proving(request, record_property):
    marks = list(request.node.iter_markers("proves"))
    if not marks:
        yield
        return
    for feature in {feature for mark in marks for feature in mark.args}:
        record_property("proves", feature)
    jax.clear_caches()
    with mock.patch.object(unproven, "FEATURES", set()):
        yield
    jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
    outcomes = Counter(
        (feature, outcome)
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, ())
        for name, feature in getattr(report, "user_properties", ())
        if name == "proves"
    )
    for feature in sorted({feature for feature, _ in outcomes}):
        counts = {outcome: outcomes[feature, outcome] for outcome in ("passed", "failed", "error")}
        verdict = "not proven" if counts["failed"] + counts["error"] else "proven"
        terminalreporter.write_line(f"{verdict}: {feature} ({counts})")

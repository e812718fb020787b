"""Settings that must be in place before JAX starts, and what `make test` leaves out."""

import os
from collections import Counter

import pytest

# The interpreter of Mosaic GPU runs each warpgroup on a thread of XLA's pool; with two cores the pool is so
# small that waiting warpgroups fill it and the one they wait for never runs.
os.environ.setdefault("PJRT_NPROC", "16")

# Here a test function with many cases runs every fifth of them; `pytest -m slow` runs the others.
THINNED = (
    *("/linear/", "/l1/", "/varlen/", "/parity/test_features"),
    *(f"/interop/test_{name}" for name in ("transformers", "kvcache", "varlen", "values", "lengths")),
)


def pytest_collection_modifyitems(items):
    cases = Counter()
    for item in items:
        if not any(part in str(item.path) for part in THINNED) or "errors" in item.path.name:
            continue
        function = item.path, item.originalname
        if cases[function] % 5:
            item.add_marker(pytest.mark.slow)
        cases[function] += 1

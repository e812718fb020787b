"""What waits for a GPU has tests that will prove it there."""

from pathlib import Path

import pytest

from pallas_kernels import unproven

SOURCE = "".join(path.read_text() for path in Path(__file__).parents[1].glob("gpu/test_*.py"))


@pytest.mark.parametrize("feature", sorted(unproven.FEATURES))
def test_has_tests_to_prove_it(feature):
    assert f'"{feature}"' in SOURCE

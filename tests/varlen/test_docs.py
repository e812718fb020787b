"""The code in docs/sequences.md runs, from top to bottom."""

import re
from pathlib import Path

import pytest


def test_sequences():
    pytest.importorskip("torch")
    text = (Path(__file__).parents[2] / "docs" / "sequences.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    exec("\n".join(blocks), {})

"""Every block of code of docs/l1_attention.md, in order."""

import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

PAGE = Path(__file__).parents[2] / "docs" / "l1_attention.md"


def test_blocks_run():
    text = PAGE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^```(\w*)$", text, re.MULTILINE) == ["python", ""] * len(blocks)
    assert len(blocks) == 6
    names = {"__name__": "l1_page"}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(PAGE), "exec"), names)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link

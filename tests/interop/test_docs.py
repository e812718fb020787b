"""Every block of code of docs/pytorch.md, in order."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "pytorch.md"


def test_blocks_run():
    text = PAGE.read_text()
    fences = re.findall(r"^```(\w*)$", text, re.MULTILINE)
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert fences == ["python", ""] * len(blocks), "a block in another language would not be run"
    assert len(blocks) > 8
    names = {"__name__": "pytorch_page"}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(PAGE), "exec"), names)

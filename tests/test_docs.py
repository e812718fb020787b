"""The pages of docs/: their Python runs from top to bottom, and their links lead somewhere."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def compiled_for_one_run():
    """Compilation is most of what the pages take."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("page", [p for p in PAGES if PROGRAM.search(p.read_text())], ids=lambda page: page.stem)
def test_programs_run(page, compiled_for_one_run):
    pytest.importorskip("torch")
    text = page.read_text()
    names = {"__name__": f"{page.stem}_page"}
    for block in PROGRAM.finditer(text):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), names)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text()
    assert set(re.findall(r"^```(\w+)$", text, re.MULTILINE)) <= {"python", "sh"}
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target.read_text()), anchor


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

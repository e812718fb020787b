"""The README says what the code says: its tables are the generated ones, and its programs run."""

import re

import pytest

from bench import plots, readme
from bench.results import Report, Row

TEXT = (readme.ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
SHAPE = {"B": 2, "Sq": 512, "Sk": 512, "H": 8, "Hk": 8, "D": 64, "Dv": 64, "causal": True, "window": None}


def row(impl, ms, direction="forward", tflops=None, **shape):
    return Row("attention", direction, impl, "float32", {**SHAPE, **shape}, ms, ms, ms, tflops=tflops)


def report(*rows):
    versions = {"jax": "0.10.2", "torch": "2.13.0"}
    return Report("a chip", "2026-01-02", "python -m bench attention", versions, None, list(rows))


def test_generated_parts_are_current():
    assert readme.render(TEXT) == TEXT, "run `make readme`"


def test_render_wants_each_part_once():
    with pytest.raises(ValueError, match=r"README.md holds 0 parts 'features', it must hold 1"):
        readme.render("no parts here")


def test_two_programs():
    assert len(PROGRAMS) == 2


@pytest.mark.parametrize("program", PROGRAMS, ids=["jax", "torch"])
def test_program_runs(program):
    if "import torch" in program:
        pytest.importorskip("torch")
    exec(compile(program, "README.md", "exec"), {})


@pytest.mark.parametrize("command", sorted(set(re.findall(r"\bmake ([a-z-]+)", TEXT))))
def test_make_targets_exist(command):
    assert re.search(rf"^{command}:", (readme.ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_no_results_is_one_line(tmp_path):
    assert readme.measurements(tmp_path) == "Nothing has been measured yet: `python -m bench attention` measures."


def test_measurements_show_losing_rows_too(tmp_path):
    rows = row("jflash", 2.0), row("peer", 3.0), row("jflash", 8.0, Sq=1024), row("peer", 4.0, Sq=1024)
    report(*rows).save(tmp_path / "run.json")
    text = readme.measurements(tmp_path)
    assert "| a chip | attention | forward | 2 | 1.00 | 0.50 | 1.50 |" in text
    assert "| float32 B2 S512 H8 D64 causal | forward | **2.00** | 3.00 |" in text
    assert "| float32 B2 S1024x512 H8 D64 causal | forward | 8.00 | **4.00** |" in text
    assert "jax 0.10.2, torch 2.13.0. Made by `python -m bench attention`." in text


def test_a_case_without_a_peer_has_no_ratio(tmp_path):
    report(row("jflash", 2.0), row("jflash:deterministic", 1.0), row("peer", 3.0, direction="both")).save(
        tmp_path / "run.json"
    )
    assert "| a chip |" not in readme.measurements(tmp_path)


def test_a_copy_is_no_peer(tmp_path):
    report(row("jflash", 2.0), row("peer", 3.0), row("copy", 1.0)).save(tmp_path / "run.json")
    text = readme.measurements(tmp_path)
    assert "| a chip | attention | forward | 1 | 1.50 | 1.50 | 1.50 |" in text
    assert "| **2.00** | 3.00 | 1.00 |" in text


def test_flops_are_shown_where_they_are(tmp_path):
    report(row("jflash", 2.0, tflops=512.4), row("peer", 3.0, tflops=341.6)).save(tmp_path / "run.json")
    text = readme.measurements(tmp_path)
    assert "| **512** | 342 |" in text
    assert "TF/s: 1 cases" in text


@pytest.mark.parametrize("tflops", [None, 500.0])
def test_plot(tmp_path, tflops):
    rows = [row(impl, 2.0, d, tflops) for impl in ("jflash", "jflash:x", "peer") for d in ("forward", "backward")]
    plots.draw(report(*rows), tmp_path / "plots" / "run.png")
    assert (tmp_path / "plots" / "run.png").read_bytes().startswith(b"\x89PNG")

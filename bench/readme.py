"""`python -m bench.readme`: rewrites the generated parts of README.md, so that no number there is typed.

A part NAME stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; `PARTS` says what makes it.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

import jflash
from bench import results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PLOTS = ROOT / "docs"  # a plot of results/NAME.json, where there is one, is docs/NAME.png
TARGET = "sm_90"  # the features table answers for an H100
OURS = "jflash"
LIMITS = ("copy",)  # no attention, so no peers: what moving the memory alone takes


def qkv(B=2, Sq=256, Sk=None, H=8, Hk=None, D=128, Dv=None, dtype="bfloat16") -> list[jax.Array]:
    shapes = (B, Sq, H, D), (B, Sk or Sq, Hk or H, D), (B, Sk or Sq, Hk or H, Dv or D)
    return [jnp.zeros(shape, dtype) for shape in shapes]


# What the features table asks about: a label, the inputs, the options.
FEATURES: tuple[tuple[str, dict, dict], ...] = (
    ("`causal`", {}, {"causal": True}),
    ("`window`", {}, {"window": (64, 0)}),
    ("grouped and multi-query heads", {"Hk": 2}, {}),
    ("other key length, any length", {"Sq": 100, "Sk": 333}, {"causal": True}),
    ("head dim 64", {"D": 64}, {}),
    ("head dim 256", {"D": 256}, {}),
    ("any head dim to 256", {"D": 80}, {}),
    ("value head dim of its own", {"Dv": 64}, {}),
    ("float16", {"dtype": "float16"}, {}),
    ("float32", {"dtype": "float32"}, {}),
    ("`softcap`", {}, {"softcap": 20.0}),
    ("`bias`, with its gradient", {}, {"bias": jnp.zeros((1, 8, 256, 256))}),
    ("`mask`", {}, {"mask": jnp.ones((2, 1, 1, 256), bool)}),
    ("`segment_ids`", {}, {"segment_ids": jnp.zeros((2, 256), int)}),
    ("`alibi_slopes`", {}, {"alibi_slopes": jnp.ones(8)}),
    ("`sinks`, with their gradient", {}, {"sinks": jnp.zeros(8)}),
    ("`dropout_rate`", {}, {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}),
    ("`deterministic`", {}, {"deterministic": True}),
)


def table(header: Iterable[str], rows: Iterable[Iterable[str]], right: int = 0) -> str:
    """Markdown; the last `right` columns are numbers, aligned to the right."""
    header = list(header)
    rule = ["---"] * (len(header) - right) + ["---:"] * right
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def features() -> str:
    """Features by backend, as `jflash.why_not` answers for an H100, in both directions."""
    backends = list(dict.fromkeys(line.split()[0] for line in jflash.explain(*qkv()).splitlines()))
    rows = []
    for name, shape, options in FEATURES:
        rows.append([name, *(_verdict(backend, qkv(**shape), options) for backend in backends)])
    return table(["", *(f"`{backend}`" for backend in backends)], rows)


def _verdict(backend: str, arrays: list[jax.Array], options: dict) -> str:
    forward, backward = (
        jflash.why_not(*arrays, implementation=backend, direction=direction, target=TARGET, **options)
        for direction in ("forward", "backward")
    )
    if forward:
        return f"no: {forward}"
    return f"forward only: {backward}" if backward else "yes"


def measurements(folder: Path = RESULTS) -> str:
    """A line a file and direction against the best peer, then every row of every file, folded away."""
    reports = {path: results.load(path) for path in sorted(folder.glob("*.json"))}
    if not reports:
        return "Nothing has been measured yet: `python -m bench attention` measures."
    header = ["device", "family", "direction", "cases", "best peer's time / ours: median", "worst", "best"]
    lines = [line for report in reports.values() for line in _summary(report)]
    return "\n\n".join([table(header, lines, right=4), *(_folded(path, report) for path, report in reports.items())])


def _summary(report: results.Report) -> Iterable[list[str]]:
    for family, direction in dict.fromkeys((row.family, row.direction) for row in report.rows):
        rows = [row for row in report.rows if (row.family, row.direction) == (family, direction)]
        ratios = [found for found in map(_ratio, _by_case(rows)) if found is not None]
        if ratios:
            middle, worst, best = statistics.median(ratios), min(ratios), max(ratios)
            numbers = (str(len(ratios)), f"{middle:.2f}", f"{worst:.2f}", f"{best:.2f}")
            yield [report.device, family, direction, *numbers]


def _ratio(case: dict[str, results.Row]) -> float | None:
    """How many times as long as ours the fastest peer takes; None where one of the two is missing."""
    peers = [row.ms for name, row in case.items() if not name.startswith(OURS) and name not in LIMITS]
    return min(peers) / case[OURS].ms if peers and OURS in case else None


def _by_case(rows: list[results.Row]) -> list[dict[str, results.Row]]:
    cases = dict.fromkeys(str(row.case) for row in rows)
    return [{row.impl: row for row in rows if str(row.case) == case} for case in cases]


def _folded(path: Path, report: results.Report) -> str:
    """All rows of a file, under a line that unfolds."""
    impls = list(dict.fromkeys(row.impl for row in report.rows))
    on_gpu = any(row.tflops is not None for row in report.rows)
    rows = []
    for case in _by_case(report.rows):
        first, fastest = next(iter(case.values())), min(row.ms for name, row in case.items() if name not in LIMITS)
        cells = [_cell(case.get(impl), fastest) for impl in impls]
        rows.append([f"{first.dtype} {results.label(first.shape)}", first.direction, *cells])
    versions = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    about = f"{versions}. Made by `{report.command}`."
    if report.matmul_tflops:
        about += f" The 8192 x 8192 x 8192 bf16 matrix product of the same run: {report.matmul_tflops:.0f} TF/s."
    plot = PLOTS / f"{path.stem}.png"
    picture = [f"![{path.stem}]({plot.relative_to(ROOT).as_posix()})"] if plot.exists() else []
    unit = "TF/s" if on_gpu else "milliseconds"
    summary = f"{path.stem}: {report.device}, {report.date}, {unit}: {len(rows)} cases"
    head = f"<details><summary>{summary}</summary>"
    return "\n\n".join(
        [head, *picture, about, table(["case", "direction", *impls], rows, right=len(impls)), "</details>"]
    )


def _cell(row: results.Row | None, fastest: float) -> str:
    if row is None:
        return ""
    digits = 2 if row.ms >= 1 else 3
    text = f"{row.ms:.{digits}f}" if row.tflops is None else f"{row.tflops:.0f}"
    return f"**{text}**" if row.ms == fastest else text


PARTS: dict[str, Callable[[], str]] = {"features": features, "measurements": measurements}


def render(text: str) -> str:
    """The text with each generated part made anew."""
    for name, make in PARTS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        part = f"{begin}\n{make()}\n{end}"
        text, found = re.subn(
            f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, part=part: part, text, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"README.md holds {found} parts {name!r}, it must hold 1")
    return text


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
    print(f"wrote {readme}")


if __name__ == "__main__":
    main()

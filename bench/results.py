"""The one schema of every result file, and the two ways to show it: a table and a plot."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = (
    "jax",
    "jaxlib",
    "torch",
    "numpy",
    "tokamax",
    "flash_attn",
    "jax-linear-attention",
    "flash-linear-attention",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. Ours and a peer's of one case share every field but impl and the numbers."""

    family: str
    direction: str
    impl: str
    dtype: str
    shape: dict[str, Any]
    ms: float
    ms_p20: float
    ms_p80: float
    tflops: float | None = None
    gbps: float | None = None
    host_us: float | None = None
    peak_mb: float | None = None

    @property
    def case(self) -> tuple:
        return self.family, self.direction, self.dtype, tuple(self.shape.items())


@dataclasses.dataclass
class Report:
    """All rows of one run on one device."""

    device: str
    date: str
    command: str
    versions: dict[str, str]
    matmul_tflops: float | None
    rows: list[Row]

    def add(self, rows: list[Row], path: Path | None) -> None:
        """Saved at once, if at all: a run that is cut off leaves what it measured."""
        self.rows += rows
        if path:
            self.save(path)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load(path: Path) -> Report:
    fields = json.loads(path.read_text())
    return Report(**{**fields, "rows": [_row(row) for row in fields["rows"]]})


def _row(fields: dict[str, Any]) -> Row:
    """A row from JSON, which turns a window's pair into a list."""
    shape = {name: tuple(x) if isinstance(x, list) else x for name, x in fields["shape"].items()}
    return Row(**{**fields, "shape": shape})


def new_report(device: str, matmul_tflops: float | None = None) -> Report:
    command = "python -m bench " + " ".join(sys.argv[1:])
    return Report(device, datetime.date.today().isoformat(), command, _versions(), matmul_tflops, [])


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def label(shape: dict[str, Any]) -> str:
    """A shape as a person writes it: B2 S8192 H16 D128 causal."""
    s = shape
    if "layer" in s:
        return f"{s['layer']} {s['rows']} x {s['width']}" + (f" x {s['hidden']}" if s["hidden"] else "")
    text = f"B{s['B']} S{s['Sq']}" + ("" if s["Sk"] == s["Sq"] else f"x{s['Sk']}")
    text += f" H{s['H']}" + ("" if s["Hk"] == s["H"] else f"/{s['Hk']}")
    text += f" D{s['D']}" + ("" if s["Dv"] == s["D"] else f"/{s['Dv']}")
    text += " causal" if s.get("causal") else ""
    text += f" decay by {s['decay']}" if s.get("decay") else ""
    text += f" mask {s['mask'][0]}x{s['mask'][1]}" if s.get("mask") else ""
    text += f" window {s['window'][0]}" if s.get("window") else ""
    text += f" pages of {s['page']}" if s.get("page") else ""
    text += " ragged" if s.get("ragged") else ""
    return text + (f" {s['feature']}" if s.get("feature") else "")


UNITS = {"tflops": "TF/s", "gbps": "GB/s", "ms": "ms"}


def show(report: Report) -> None:
    """One line a case and one column an implementation; the fastest is bold."""
    impls = list(dict.fromkeys(row.impl for row in report.rows))
    field = next((x for x in ("tflops", "gbps") if all(getattr(row, x) is not None for row in report.rows)), "ms")
    table = Table(title=f"{report.device}, {UNITS[field]}", title_justify="left")
    for column in ("case", "direction", *impls):
        table.add_column(column, justify="left" if column in ("case", "direction") else "right")
    for case in dict.fromkeys(row.case for row in report.rows):
        rows = {row.impl: row for row in report.rows if row.case == case}
        best = min(row.ms for row in rows.values())
        cells = [_cell(rows.get(impl), field, best) for impl in impls]
        first = next(iter(rows.values()))
        table.add_row(f"{first.dtype} {label(first.shape)}", first.direction, *cells)
    Console(width=200).print(table)


def _cell(row: Row | None, field: str, best: float) -> str:
    if row is None:
        return "-"
    text = f"{getattr(row, field):.{2 if field == 'ms' else 0}f}"
    return f"[bold]{text}[/bold]" if row.ms == best else text


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in sys.modules and (cudnn := sys.modules["torch"].backends.cudnn.version()):
        found["cudnn"] = str(cudnn)
    return found

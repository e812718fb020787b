"""`python -m bench.plots results.json plot.png`: one panel a direction, one line of dots a case."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import results

OURS = "#d1495b"
PEERS = (
    "#3d405b",
    "#2a9d8f",
    "#e9a23b",
    "#8d99ae",
    "#6a4c93",
    "#5b8e7d",
    "#b08968",
    "#457b9d",
    "#9c6644",
    "#808080",
)


def draw(report: results.Report, path: Path) -> None:
    """TF/s where the rows have them, else milliseconds; ours larger and in front."""
    directions = list(dict.fromkeys(row.direction for row in report.rows))
    cases = max(len({_label(row) for row in report.rows if row.direction == d}) for d in directions)
    figure = Figure(figsize=(6.5 * len(directions), 1.6 + 0.24 * cases), layout="constrained")
    panels = figure.subplots(1, len(directions), squeeze=False)[0]
    colors = _colors(report.rows)
    for axes, direction in zip(panels, directions, strict=True):
        _panel(axes, [row for row in report.rows if row.direction == direction], colors)
        axes.set_title(direction)
    handles = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"{report.device}, {report.date}")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """With a grid, and without the frame's upper and right side."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panel(axes: Axes, rows: list[results.Row], colors: dict[str, str]) -> None:
    labels = list(dict.fromkeys(_label(row) for row in rows))
    on_gpu = all(row.tflops is not None for row in rows)
    for impl in dict.fromkeys(row.impl for row in rows):
        mine = [row for row in rows if row.impl == impl]
        ours = impl == "jflash"
        x = [row.ms if row.tflops is None else row.tflops for row in mine]
        y = [labels.index(_label(row)) for row in mine]
        axes.plot(x, y, "o", label=impl, color=colors[impl], ms=8 if ours else 5, zorder=3 if ours else 2)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("TF/s, more is better" if on_gpu else "milliseconds, less is better")
    if on_gpu:
        axes.set_xlim(left=0)
    else:
        axes.set_xscale("log")


def _label(row: results.Row) -> str:
    return f"{row.dtype} {results.label(row.shape)}"


def _colors(rows: list[results.Row]) -> dict[str, str]:
    """The same colour for an implementation in every panel; variants of ours are ours, paler."""
    colors = {impl: OURS for impl in dict.fromkeys(row.impl for row in rows) if impl == "jflash"}
    for impl in dict.fromkeys(row.impl for row in rows):
        if impl.startswith("jflash:"):
            colors[impl] = OURS + "80"
    peers = [impl for impl in dict.fromkeys(row.impl for row in rows) if impl not in colors]
    return colors | {impl: PEERS[i % len(PEERS)] for i, impl in enumerate(peers)}


def main(draw: Callable[[results.Report, Path], None], description: str) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("results", type=Path, help="a file of bench/results")
    parser.add_argument("plot", type=Path, help="the PNG to write")
    args = parser.parse_args()
    draw(results.load(args.results), args.plot)
    print(f"wrote {args.plot}")


if __name__ == "__main__":
    main(draw, "Draws a results file.")

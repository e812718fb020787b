"""`python -m bench.lengths results.json plot.png`: time against sequence length, a line an implementation."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from bench import results
from bench.plots import OURS, PEERS

TITLES = {"both": "forward and backward"}
# What the variants of ours are called in `bench.linear`.
FORMS = {"jflash": "O(N), decay", "jflash:masked": "masked", "jflash:softmax": "softmax"}


def draw(report: results.Report, path: Path) -> None:
    """A panel a direction, both axes logarithmic."""
    directions = list(dict.fromkeys(row.direction for row in report.rows))
    colors = dict(zip(dict.fromkeys(row.impl for row in report.rows), (OURS, *PEERS), strict=False))
    figure = Figure(figsize=(4.8 * len(directions), 3.8), layout="constrained")
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        for impl, color in colors.items():
            rows = [row for row in report.rows if (row.impl, row.direction) == (impl, direction)]
            lengths = [row.shape["Sq"] for row in rows]
            axes.plot(lengths, [row.ms for row in rows], "o-", color=color, label=FORMS.get(impl, impl))
            low, high = [row.ms_p20 for row in rows], [row.ms_p80 for row in rows]
            axes.fill_between(lengths, low, high, color=color, alpha=0.15, lw=0)
        title = TITLES.get(direction, direction)
        axes.set(xscale="log", yscale="log", xlabel="sequence length", ylabel="ms", title=title)
        ticks = sorted({row.shape["Sq"] for row in report.rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    row = report.rows[0]
    figure.suptitle(f"{report.device}, {row.dtype}, B{row.shape['B']} H{row.shape['H']} D{row.shape['D']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws a results file of one shape at many lengths.")
    parser.add_argument("results", type=Path, help="a file of bench/results")
    parser.add_argument("plot", type=Path, help="the PNG to write")
    args = parser.parse_args()
    draw(results.load(args.results), args.plot)
    print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()

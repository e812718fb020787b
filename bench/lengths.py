"""`python -m bench.lengths results.json plot.png`: time against sequence length, a line an implementation."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from bench import plots, results
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
    figure.axes[0].legend(frameon=False)
    row = report.rows[0]
    figure.suptitle(f"{report.device}, {row.dtype}, B{row.shape['B']} H{row.shape['H']} D{row.shape['D']}")
    plots.save(figure, path)


if __name__ == "__main__":
    plots.main(draw, "Draws a results file of one shape at many lengths.")

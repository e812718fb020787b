"""What the benchmarks make of measurements."""

import dataclasses

import pytest

from bench import tune
from bench.results import Row


def row(impl: str, tflops: float) -> Row:
    return Row("tiles", "forward", impl, "bfloat16", {}, 1.0, 1.0, 1.0, tflops=tflops)


def test_tune_shows_the_table_s_tile_and_what_beats_it():
    full = [row("stages=2", 700.0), row("jflash", 650.4), row("stages=3", 600.0), row("stages=4", 10.0)]
    causal = [row("jflash", 600.0), row("stages=3", 610.0), row("stages=2", 500.0)]
    assert tune.lines("forward", 128, full, causal) == [
        "forward 128: jflash  # 650 / 600",
        "forward 128: stages=2  # 700 / 500",
        "forward 128: stages=3  # 600 / 610",
    ]


@pytest.mark.parametrize(("direction", "dim"), tune.CHANGES)
def test_tune_changes_every_row_of_the_table(direction, dim):
    tile = tune.TABLES[direction][dim]
    assert all(dataclasses.replace(tile, **changes) != tile for changes in tune.CHANGES[direction, dim])
    assert tune.CHANGES.keys() == {(name, dim) for name, table in tune.TABLES.items() for dim in table}

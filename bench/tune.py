"""`python -m bench tune`: other tiles for softmax attention, beside those of the table.

Prints a line for each row of `pallas_kernels/tiles.py`, with what its tile and the best of the others measured:
the numbers that stand beside the rows there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax

from bench import results, run
from bench.attention import TOKENS, WIDTH
from bench.peers import Case, jax_inputs
from bench.timing import Timed, interleaved
from jflash import flash_attention
from pallas_kernels import tiles

TABLES = {"forward": tiles.FORWARD, "backward": tiles.BACKWARD}
LENGTH = 8192
OURS = "jflash"  # the table's tile, in the rows of the JSON
CHANGES: dict[tuple[str, int], list[dict]] = {  # what fits shared memory, and that the kernels are right with
    ("forward", 64): [
        dict(stages=2),
        dict(q_stages=1),
        dict(warpgroups=2, registers=240, producer_registers=24),
    ],
    ("forward", 128): [dict(q_stages=1), dict(lazy=True)],
    ("forward", 192): [dict(q_stages=1), dict(lazy=False)],
    ("forward", 256): [dict(lazy=False)],
    ("backward", 64): [dict(registers=232, producer_registers=40)],
    ("backward", 128): [dict(stages=3), dict(registers=232, producer_registers=40)],
    ("backward", 192): [dict(stages=1)],
    ("backward", 256): [dict(stages=1)],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dims", nargs="+", type=int, choices=sorted(tiles.FORWARD), default=sorted(tiles.FORWARD))
    parser.add_argument("--directions", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=4, help="turns each tile gets [4]")
    parser.add_argument("--seconds", type=float, default=0.04, help="length of a turn [0.04]")
    parser.add_argument("--out", type=Path, help="where the JSON goes")


def main(args: argparse.Namespace) -> None:
    report = run.new_report()
    for direction in args.directions:
        for dim in args.dims:
            found = [_measure(direction, dim, causal, args) for causal in (False, True)]
            report.add([row for rows in found for row in rows], args.out)
            print("\n".join(lines(direction, dim, *found)), flush=True)


def lines(direction: str, dim: int, full: list[results.Row], causal: list[results.Row]) -> list[str]:
    """The row of the table with its TF/s full / causal, and below it the tiles that beat it in either."""
    tflops = [{row.impl: row.tflops or 0.0 for row in rows} for rows in (full, causal)]
    shown = []
    for name in {name: None for rows in tflops for name in rows}:
        pair = [rows.get(name, 0.0) for rows in tflops]
        if name == OURS or any(found > rows.get(OURS, 0.0) for found, rows in zip(pair, tflops, strict=True)):
            shown.append((name != OURS, f"{direction} {dim}: {name}  # {pair[0]:.0f} / {pair[1]:.0f}"))
    return [line for _, line in sorted(shown, key=lambda entry: entry[0])]


def _measure(direction: str, dim: int, causal: bool, args: argparse.Namespace) -> list[results.Row]:
    heads = WIDTH // dim
    case = Case(TOKENS // LENGTH, LENGTH, LENGTH, heads, heads, dim, dim, causal)
    timed: dict[str, Timed] = {}
    for changes in ({}, *CHANGES[direction, dim]):
        name = " ".join(f"{key}={value}" for key, value in changes.items()) or OURS
        try:
            timed[name] = Timed(compiled(direction, case, changes), jax.block_until_ready)
        except Exception as error:
            print(f"  {direction} {dim} {name}: {type(error).__name__}: {str(error)[:120]}".replace("\n", " "))
    shape = dataclasses.asdict(case)
    return [
        results.Row(
            "tiles", direction, name, "bfloat16", shape, **dataclasses.asdict(spread),
            tflops=case.flops(direction) / spread.ms / 1e9,
        )
        for name, spread in interleaved(timed, args.rounds, args.seconds).items()
    ]  # fmt: skip


def compiled(direction: str, case: Case, changes: dict) -> Callable[[], object]:
    """A direction of a case with a tile other than the table's. Compiled at once: jit would find the table's again."""
    attend = functools.partial(flash_attention, causal=case.causal, implementation="hopper")
    *qkv, cotangent = jax_inputs(case, "bfloat16")
    table = TABLES[direction]
    tile = dataclasses.replace(table[case.D], **changes)
    jax.clear_caches()
    with mock.patch.dict(table, {case.D: tile}):
        if direction == "forward":
            return functools.partial(jax.jit(attend).lower(*qkv).compile(), *qkv)
        _, pull = jax.jit(functools.partial(jax.vjp, attend))(*qkv)
        backward = jax.jit(lambda pull, cotangent: pull(cotangent))
        return functools.partial(backward.lower(pull, cotangent).compile(), pull, cotangent)

"""What every benchmark does around its cases: arguments, the choice of them, and a report of this device."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from bench import results
from bench.timing import Timed, interleaved

DIRECTIONS = ("forward", "backward", "both")


def add_arguments(
    parser: argparse.ArgumentParser, presets: Iterable[str], usual: str, directions: Sequence[str] = DIRECTIONS
) -> None:
    """usual: what runs on a GPU if nobody says what."""
    parser.add_argument("--cases", nargs="+", choices=presets, help=f"what to run [{usual} on a GPU, else cpu]")
    if directions:
        parser.add_argument("--directions", nargs="+", choices=directions)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--impls", nargs="+", help="only these implementations [all that are installed]")
    parser.add_argument("--rounds", type=int, default=5, help="turns each implementation gets [5]")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a turn [0.1]")
    parser.add_argument("--out", type=Path, help="where the JSON goes")


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def presets(args: argparse.Namespace, *usual: str) -> Sequence[str]:
    return args.cases or (usual if on_gpu() else ("cpu",))


def directions(args: argparse.Namespace, usual: Sequence[str], on_cpu: Sequence[str]) -> Sequence[str]:
    return args.directions or (usual if on_gpu() else on_cpu)


def dtype(args: argparse.Namespace) -> str:
    return args.dtype or ("bfloat16" if on_gpu() else "float32")


def new_report(with_matmul: bool = True) -> results.Report:
    """Without rows. with_matmul: on a GPU, with its speed at a matrix product, to compare boards by."""
    if not on_gpu():
        return results.new_report(results.cpu_name())
    return results.new_report(jax.devices()[0].device_kind, _matmul_tflops() if with_matmul else None)


def _matmul_tflops(n: int = 8192) -> float:
    x, y = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda x, y: x @ y)
    spread = interleaved({"matmul": Timed(lambda: product(x, y), jax.block_until_ready)})
    return 2 * n**3 / spread["matmul"].ms / 1e9

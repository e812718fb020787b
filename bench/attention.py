"""`python -m bench attention`: softmax attention over the shapes that the papers use."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench import results
from bench.peers import FEATURES, PEERS, Case, Peer
from bench.timing import Timed, interleaved

TOKENS, WIDTH = 16384, 2048  # B * S and H * D of the sweep


def cases(names: list[str]) -> Iterator[Case]:
    for name in names:
        yield from PRESETS[name]()


def sweep(dims=(64, 128, 256), lengths=(512, 1024, 2048, 4096, 8192, 16384)) -> Iterator[Case]:
    """The sweep of the FlashAttention-3 paper: 16k tokens, width 2048."""
    for d in dims:
        for s in lengths:
            for causal in (False, True):
                yield Case(TOKENS // s, s, s, WIDTH // d, WIDTH // d, d, d, causal)


def others() -> Iterator[Case]:
    """Other head dims, grouped heads, windows, odd lengths."""
    for d, dv in ((96, 96), (192, 192), (192, 128)):
        for causal in (False, True):
            yield Case(4, 4096, 4096, 16, 16, d, dv, causal)
    yield Case(4, 4096, 4096, 32, 8, 128, 128, True)
    for window in (1024, 128):
        yield Case(4, 4096, 4096, 16, 16, 128, 128, True, (window, 0))
    for s in (1000, 4099):
        for causal in (False, True):
            yield Case(TOKENS // s, s, s, 16, 16, 128, 128, causal)


def features() -> Iterator[Case]:
    """What each feature adds to plain causal attention, which is the first row of each head dim."""
    for d in (128, 64):
        for feature in (None, *FEATURES):
            yield Case(4, 4096, 4096, WIDTH // d, WIDTH // d, d, d, True, feature=feature)


def cpu() -> Iterator[Case]:
    for s in (2048, 4096):
        for causal in (False, True):
            yield Case(1, s, s, 8, 8, 64, 64, causal)


PRESETS = {
    "sweep": sweep,
    "others": others,
    "features": features,
    "long": lambda: sweep(lengths=(8192,)),
    "foundation": lambda: sweep(dims=(128, 64), lengths=(8192,)),
    "cpu": cpu,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", choices=PRESETS, help="what to run [sweep on a GPU, else cpu]")
    parser.add_argument("--directions", nargs="+", choices=("forward", "backward", "both"))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--impls", nargs="+", help="only these implementations [all that are installed]")
    parser.add_argument("--rounds", type=int, default=5, help="turns each implementation gets [5]")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a turn [0.1]")
    parser.add_argument("--out", type=Path, help="where the JSON goes")


def main(args: argparse.Namespace) -> results.Report:
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    on_gpu = device == "cuda"
    peers = available(PEERS, device, args.impls)
    dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    name = jax.devices()[0].device_kind if on_gpu else results.cpu_name()
    report = results.new_report(name, matmul_tflops() if on_gpu else None)
    for case in cases(args.cases or (["sweep"] if on_gpu else ["cpu"])):
        for direction in args.directions or (["forward", "backward"] if on_gpu else ["forward", "both"]):
            report.rows += _measure(peers, case, dtype, direction, args, on_gpu)
            if args.out:
                report.save(args.out)  # a run that is cut off leaves what it measured
    results.show(report)
    return report


def matmul_tflops(n: int = 8192) -> float:
    """The same run's bf16 matrix product, to compare boards by."""
    x, y = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda x, y: x @ y)
    spread = interleaved({"matmul": Timed(lambda: product(x, y), jax.block_until_ready)})
    return 2 * n**3 / spread["matmul"].ms / 1e9


def available(peers: Iterable[Peer], device: str, wanted: list[str] | None) -> list[Peer]:
    """Those that can run here, of all or of the wanted names; says why of the others."""
    found = []
    for peer in peers:
        if wanted is not None and peer.name not in wanted:
            continue
        reason = peer.why_not(device)
        print(f"{peer.name:<22} {'here' if reason is None else 'not here: ' + reason}", flush=True)
        if reason is None:
            found.append(peer)
    return found


def ready(peers: Iterable[Peer], case: Any, dtype: str, direction: str) -> dict[str, Timed]:
    """The peers that can do a case, after a first run; says why of the others."""
    found: dict[str, Timed] = {}
    for peer in peers:
        try:
            timed = peer.prepare(case, dtype, direction)
            timed.wait(timed.run())
            found[peer.name] = timed
        except Exception as error:
            print(f"  {peer.name} {direction}: {type(error).__name__}: {str(error)[:160]}".replace("\n", " "))
    return found


def _measure(peers: list[Peer], case: Case, dtype: str, direction: str, args, on_gpu: bool) -> list[results.Row]:
    shape = dataclasses.asdict(case)
    flops = case.flops(direction)
    rows = []
    peers = [peer for peer in peers if case.feature is None or peer.features]
    for name, spread in interleaved(ready(peers, case, dtype, direction), args.rounds, args.seconds).items():
        tflops = flops / spread.ms / 1e9 if on_gpu else None
        rows.append(
            results.Row("attention", direction, name, dtype, shape, **dataclasses.asdict(spread), tflops=tflops)
        )
    line = "  ".join(f"{r.impl} {r.tflops:.0f}" if r.tflops else f"{r.impl} {r.ms:.1f}ms" for r in rows)
    print(f"{results.label(shape)} {direction}: {line}", flush=True)
    return rows

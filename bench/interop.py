"""`python -m bench interop`: what a call from PyTorch costs on the host, while nobody waits for the GPU."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import results, run
from bench.peers import Case, Peer, available, ready, torch_peer
from bench.timing import Timed

CALLS = 50  # queued in a turn: fewer than the GPU takes before the host must wait
CASES = (  # with little for the GPU to do
    Case(1, 512, 512, 8, 8, 64, 64, True),
    Case(1, 512, 512, 8, 8, 128, 128, True),
    Case(1, 768, 768, 8, 2, 128, 128),
)


def _ours(case: Case) -> Callable:
    from interop import flash_attn_func

    return functools.partial(flash_attn_func, causal=case.causal)


class _Nobody(dict):
    """For `interop.direct.launches`: every call is known to be the bridge's."""

    def __contains__(self, key: object) -> bool:
        return True


@contextlib.contextmanager
def _bridged() -> Iterator[None]:
    """Every call goes through XLA."""
    from interop import direct

    launches, direct.launches = direct.launches, _Nobody()
    try:
        yield
    finally:
        direct.launches = launches


def _bridge(case: Case, dtype: str, direction: str) -> Timed:
    """Ours, through XLA. It is prepared where all calls are."""
    timed = torch_peer(_ours)(case, dtype, direction)

    def run() -> Any:
        with _bridged():
            return timed.run()

    return Timed(run, timed.wait)


def _sdpa(case: Case) -> Callable:
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    return functools.partial(attend, is_causal=case.causal, enable_gqa=case.H != case.Hk)


def _named(module: str, case: Case) -> Callable:
    """The `flash_attn_func` of a module."""
    return functools.partial(importlib.import_module(module).flash_attn_func, causal=case.causal)


PEERS = (
    Peer("jflash", ("torch",), ("cpu", "cuda"), torch_peer(_ours)),
    Peer("jflash:bridge", ("torch",), ("cuda",), _bridge),
    Peer("torch SDPA", ("torch",), ("cpu", "cuda"), torch_peer(_sdpa, heads_first=True)),
    Peer("flash_attn", ("flash_attn",), ("cuda",), torch_peer(functools.partial(_named, "flash_attn"))),
    Peer("fa3", ("fa3_fwd_interface",), ("cuda",), torch_peer(functools.partial(_named, "fa3_fwd_interface"))),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directions", nargs="+", choices=("forward", "backward", "both"), default=["forward", "both"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--impls", nargs="+", help="only these implementations [all that are installed]")
    parser.add_argument("--rounds", type=int, default=9, help=f"turns of {CALLS} calls each implementation gets [9]")
    parser.add_argument("--out", type=Path, help="where the JSON goes")


def main(args: argparse.Namespace) -> results.Report:
    peers, report = available(PEERS, args.impls), run.new_report(with_matmul=False)
    tasks = [(case, args.dtype, direction) for case in CASES for direction in args.directions]
    for (case, dtype, direction), candidates in zip(tasks, _prepared(peers, tasks), strict=True):
        shape = dataclasses.asdict(case)
        found = _measure(candidates, args.rounds)
        rows = [results.Row("interop", direction, name, dtype, shape, **row) for name, row in found.items()]
        line = "  ".join(f"{row.impl} {row.host_us:.1f}" for row in rows)
        print(f"{results.label(shape)} {direction}, host us a call: {line}", flush=True)
        report.add(rows, args.out)
    return report


def _prepared(peers: list[Peer], tasks: list[tuple]) -> list[dict[str, Timed]]:
    """What can do each task, compiled side by side: that takes longer than to time. The bridge's calls come last."""
    if run.on_gpu():  # a first call alone: it tries out direct launches, which every thread would do by itself
        torch_peer(_ours)(*tasks[0]).run()
    bridge = [peer for peer in peers if peer.prepare is _bridge]
    others = [peer for peer in peers if peer.prepare is not _bridge]
    with ThreadPoolExecutor(len(tasks) if run.on_gpu() else 1) as pool:
        found = list(pool.map(lambda task: ready(others, *task), tasks))
        with _bridged():
            return [a | b for a, b in zip(found, pool.map(lambda task: ready(bridge, *task), tasks), strict=True)]


def _measure(candidates: dict[str, Timed], rounds: int) -> dict[str, dict[str, float]]:
    """For each implementation the time of a call, and the part of it until the next can be made."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, timed in candidates.items():
            turns[name].append(_turn(timed))
    found = {}
    for name, samples in turns.items():
        host, whole = zip(*samples, strict=True)
        cuts = statistics.quantiles(whole, n=5, method="inclusive") if rounds > 1 else whole
        medians = {"ms": 1e3 * statistics.median(whole), "host_us": 1e6 * statistics.median(host)}
        found[name] = {**medians, "ms_p20": 1e3 * cuts[0], "ms_p80": 1e3 * cuts[-1]}
    return found


def _turn(timed: Timed) -> tuple[float, float]:
    """Seconds a call, of CALLS in a row: until they are queued, and until they are done."""
    timed.wait(timed.run())
    start = time.perf_counter()
    for _ in range(CALLS):
        result = timed.run()
    queued = time.perf_counter()
    timed.wait(result)
    return (queued - start) / CALLS, (time.perf_counter() - start) / CALLS

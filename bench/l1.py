"""`python -m bench l1`: L1 attention beside torch.cdist and the formula in jnp, and the limit of its subtractions."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from bench import results, run
from bench.peers import Case, Peer, available, jax_peer, prepared, torch_peer
from bench.timing import Spread, Timed, interleaved
from jflash import l1_attention

# An H100 adds 128 float32 numbers a clock on each of 132 processors, at 1.98 GHz.
ADDITIONS_PER_MS = 128 * 132 * 1.98e6
# Differences of all features of all pairs, over which the backward of cdist counts with 32 bits.
MOST_DIFFERENCES = 2**31


def goals() -> Iterator[Case]:
    """The shapes that the goals are set on."""
    yield Case(1, 4096, 4096, 16, 16, 64, 64)
    yield Case(1, 2048, 2048, 8, 8, 128, 128)


def others() -> Iterator[Case]:
    """Causal, grouped heads, other head dims, odd lengths, long."""
    yield Case(1, 4096, 4096, 16, 16, 64, 64, True)
    yield Case(2, 4096, 4096, 16, 4, 32, 32, True)
    yield Case(4, 1000, 1000, 8, 8, 64, 64)
    yield Case(1, 65536, 65536, 1, 1, 64, 64)


def cpu() -> Iterator[Case]:
    yield Case(1, 2048, 2048, 8, 8, 64, 64)
    yield Case(1, 2048, 2048, 8, 8, 128, 128)
    yield Case(1, 2048, 2048, 8, 8, 64, 64, True)


PRESETS = {"goals": goals, "others": others, "cpu": cpu}


def _jflash(case: Case) -> Callable:
    return lambda q, k, v: l1_attention(q, k, v, causal=case.causal)


def _formula(case: Case) -> Callable:
    """What one writes in jnp; its backward finds the differences again, as they would not fit the memory."""
    _check_plain(case)

    @jax.checkpoint
    def attend(q, k, v):
        wide = jnp.promote_types(q.dtype, jnp.float32)
        d = jnp.abs(q[:, :, None].astype(wide) - k[:, None].astype(wide)).sum(axis=-1)
        weights = jax.nn.softmax(-d * case.D**-0.5, axis=2)
        return jnp.einsum("btsh,bshw->bthw", weights.astype(v.dtype), v)

    return attend


def _cdist(case: Case) -> Callable:
    """What one writes in torch."""
    import torch

    _check_plain(case)

    def attend(q, k, v):
        if q.dtype != torch.float32:
            raise NotImplementedError("cdist knows no 16-bit types")
        differences = case.B * case.H * case.Sq * case.Sk * case.D
        if q.requires_grad and differences > MOST_DIFFERENCES:
            raise NotImplementedError(f"{differences} differences must be <= {MOST_DIFFERENCES}")
        d = torch.cdist(q.transpose(1, 2), k.transpose(1, 2), p=1)
        weights = (-d * case.D**-0.5).softmax(-1)
        return (weights @ v.transpose(1, 2)).transpose(1, 2)

    return attend


def _check_plain(case: Case) -> None:
    """Without a mask or groups, and with scores that fit the memory a few times over."""
    if case.causal or case.H != case.Hk:
        raise NotImplementedError("the formula is without a mask and groups")
    scores, most = case.B * case.H * case.Sq * case.Sk, 2e9 if run.on_gpu() else 3e8
    if scores > most:
        raise NotImplementedError(f"{scores:.1g} scores in memory must be <= {most:.1g}")


BOTH = ("cpu", "cuda")
PEERS = (
    Peer("jflash", (), BOTH, jax_peer(_jflash)),
    Peer("torch cdist", ("torch",), BOTH, torch_peer(_cdist)),
    Peer("jnp formula", (), BOTH, jax_peer(_formula)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run.add_arguments(parser, PRESETS, "goals")


def main(args: argparse.Namespace) -> results.Report:
    peers, report = available(PEERS, args.impls), run.new_report()
    cases = [case for preset in run.presets(args, "goals") for case in PRESETS[preset]()]
    dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"] if run.on_gpu() else ["float32"]
    directions = run.directions(args, ("forward", "backward"), ("forward",))
    for task, found in prepared(peers, itertools.product(cases, dtypes, directions)):
        report.add(_measure(found, *task, args), args.out)
    results.show(report)
    return report


def _measure(found: dict[str, Timed], case: Case, dtype: str, direction: str, args) -> list[results.Row]:
    shape = dataclasses.asdict(case)
    rows = [
        results.Row("l1", direction, name, dtype, shape, **dataclasses.asdict(spread))
        for name, spread in _timed(found, args).items()
    ]
    line = "  ".join(f"{row.impl} {row.ms:.2f}ms" for row in rows)
    print(f"{dtype} {results.label(shape)} {direction}: {line}{_limit(case, direction)}", flush=True)
    return rows


def _timed(found: dict[str, Timed], args) -> dict[str, Spread]:
    """In turns; on a GPU, those that take longer than a turn after the others, in two turns of their own."""
    slow = {}
    if run.on_gpu():
        slow = {name: timed for name, timed in found.items() if _seconds(timed) > args.seconds}
    quick = {name: timed for name, timed in found.items() if name not in slow}
    return interleaved(quick, args.rounds, args.seconds) | interleaved(slow, 2, args.seconds)


def _seconds(timed: Timed) -> float:
    start = time.perf_counter()
    timed.wait(timed.run())
    return time.perf_counter() - start


def _limit(case: Case, direction: str) -> str:
    """A subtraction and an addition for each feature of each pair, on an H100 that does nothing else."""
    if not run.on_gpu() or direction != "forward":
        return ""
    return f"  two instructions {2 * case.B * case.H * case.visible * case.D / ADDITIONS_PER_MS:.2f}ms"

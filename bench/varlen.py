"""`python -m bench varlen`: packed sequences of log-normal lengths, beside sequences of one length."""

from __future__ import annotations

# pyright: reportMissingImports=false
import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from bench import peers, results, run
from bench.peers import Peer, Shape, available, jax_peer, prepared, torch_peer
from bench.timing import Timed, interleaved
from jflash import flash_attention, flash_attention_varlen

TOKENS, WIDTH, SIGMA = 16384, 2048, 0.8


@dataclasses.dataclass(frozen=True)
class Case(Shape):
    """B sequences of Sq tokens in all."""

    causal: bool = False

    @property
    def lengths(self) -> np.ndarray:
        """Log-normal, the same every run."""
        drawn = np.random.default_rng(0).lognormal(0, SIGMA, self.B)
        ends = np.round(np.cumsum(drawn) / drawn.sum() * self.Sq).astype(int)
        return np.diff(ends, prepend=0)

    @property
    def cu_seqlens(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    @property
    def dense(self) -> peers.Case:
        """As many tokens in sequences of one length, with about as much work."""
        B = max(1, round(self.Sq / (np.square(self.lengths).sum() / self.Sq)))
        S = self.Sq // B
        return peers.Case(B, S, S, self.H, self.Hk, self.D, self.Dv, self.causal)

    def flops(self, direction: str) -> float:
        """As of a dense call: causal counts half, backward 2.5 times the forward."""
        pairs = float(np.square(self.lengths).sum()) / (2 if self.causal else 1)
        return {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction] * 2 * self.H * pairs * (self.D + self.Dv)


def sweep(d: int, tokens: int = TOKENS, width: int = WIDTH) -> Iterator[Case]:
    for B in (8, 32):
        for causal in (True, False):
            yield Case(B, tokens, tokens, width // d, width // d, d, d, causal)


def grouped() -> Iterator[Case]:
    yield Case(8, TOKENS, TOKENS, 32, 8, 128, 128, True)


PRESETS = {
    "D128": lambda: sweep(128),
    "D64": lambda: sweep(64),
    "grouped": grouped,
    "cpu": lambda: sweep(64, 2048, 512),
}


def _inputs(case: Case, dtype: str) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the output, packed."""
    whole = peers.Case(1, case.Sq, case.Sk, case.H, case.Hk, case.D, case.Dv)
    return tuple(x[0] for x in peers.jax_inputs(whole, dtype))


def _jflash(case: Case) -> Callable:
    def attend(q, k, v):
        cu = jax.lax.optimization_barrier(jnp.asarray(case.cu_seqlens))  # as if it were not known yet
        return flash_attention_varlen(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=case.causal)

    return attend


def _dense(case: Case, dtype: str, direction: str):
    attend = jax_peer(lambda case: functools.partial(flash_attention, causal=case.causal))
    return attend(case.dense, dtype, direction)


def _fa3_jax(case: Case) -> Callable:
    from dew_flash_attn import flash_mha_varlen

    return functools.partial(
        flash_mha_varlen, cu_seqlens=case.cu_seqlens, max_seqlen=int(case.lengths.max()), is_causal=case.causal
    )


def _of_torch(case: Case) -> tuple:
    """cu_seqlens twice and the longest length twice."""
    import torch

    cu = torch.from_numpy(case.cu_seqlens).to("cuda" if torch.cuda.is_available() else "cpu")
    return cu, cu, int(case.lengths.max()), int(case.lengths.max())


def _fa3_torch(case: Case) -> Callable:
    from fa3_fwd_interface import flash_attn_varlen_func

    lengths = _of_torch(case)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, *lengths, causal=case.causal)


def _fa2_torch(case: Case) -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    if case.H != case.Hk:
        raise NotImplementedError("varlen_attn has no groups of heads")
    lengths = _of_torch(case)
    return lambda q, k, v: varlen_attn(q, k, v, *lengths, window_size=(-1, 0) if case.causal else (-1, -1))


PEERS = (
    Peer("jflash", (), ("cpu", "cuda"), jax_peer(_jflash, _inputs)),
    Peer("jflash:dense", (), ("cpu", "cuda"), _dense),
    Peer("fa3", ("dew_flash_attn",), ("cuda",), jax_peer(_fa3_jax, _inputs)),
    Peer("fa3:torch", ("fa3_fwd_interface",), ("cuda",), torch_peer(_fa3_torch, inputs=_inputs)),
    Peer("fa2:torch", ("torch.nn.attention.varlen",), ("cuda",), torch_peer(_fa2_torch, inputs=_inputs)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run.add_arguments(parser, PRESETS, "all")


def main(args: argparse.Namespace) -> results.Report:
    found, dtype, report = available(PEERS, args.impls), run.dtype(args), run.new_report()
    presets = run.presets(args, *(name for name in PRESETS if name != "cpu"))
    cases = [case for preset in presets for case in PRESETS[preset]()]
    directions = run.directions(args, ("forward", "backward"), ("forward", "both"))
    for task, timed in prepared(found, itertools.product(cases, [dtype], directions)):
        report.add(_measure(timed, *task, args), args.out)
    results.show(report)
    return report


def _measure(timed: dict[str, Timed], case: Case, dtype: str, direction: str, args) -> list[results.Row]:
    shape, rows = dataclasses.asdict(case), []
    for name, spread in interleaved(timed, args.rounds, args.seconds).items():
        flops = (case.dense if name == "jflash:dense" else case).flops(direction)
        tflops = flops / spread.ms / 1e9 if run.on_gpu() else None
        rows.append(results.Row("varlen", direction, name, dtype, shape, **dataclasses.asdict(spread), tflops=tflops))
    line = "  ".join(f"{r.impl} {r.tflops:.0f}" if r.tflops else f"{r.impl} {r.ms:.1f}ms" for r in rows)
    print(f"{results.label(shape)} {direction}: {line}", flush=True)
    return rows

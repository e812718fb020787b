"""`python -m bench decode`: a few queries on a key/value cache, in GB/s of the cache that they read."""

from __future__ import annotations

# pyright: reportMissingImports=false
import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import results, run
from bench.peers import Peer, Shape, available, ready
from bench.timing import Timed, interleaved
from jflash import flash_attention_with_kvcache

COLD = 400e6  # bytes that a turn reads at least, so that nothing it reads is still in the 50 MB of L2


@dataclasses.dataclass(frozen=True)
class Case(Shape):
    """Sq queries of each entry on a cache of Sk keys, all in use, or from a quarter of them up if ragged."""

    causal: bool = True
    page: int | None = None
    ragged: bool = False

    @property
    def lengths(self) -> np.ndarray:
        if not self.ragged:
            return np.full(self.B, self.Sk, np.int32)
        return np.random.default_rng(0).integers(self.Sk // 4, self.Sk + 1, self.B, dtype=np.int32)

    def bytes(self, itemsize: int) -> float:
        """Of keys and values in use."""
        return float(self.lengths.sum()) * self.Hk * (self.D + self.Dv) * itemsize

    def copies(self, itemsize: int) -> int:
        """Caches that take turns."""
        return min(32, math.ceil(COLD / self.bytes(itemsize))) if run.on_gpu() else 1

    def table(self) -> np.ndarray:
        """Pages in random order."""
        assert self.page is not None
        pages = self.Sk // self.page
        return np.random.default_rng(1).permutation(self.B * pages).astype(np.int32).reshape(self.B, pages)


def _case(B: int, H: int, Hk: int, Sk: int, Sq: int = 1, D: int = 128, **fields) -> Case:
    return Case(B, Sq, Sk, H, Hk, D, D, **fields)


GROUPED = (16, 32, 8, 4096)


def large() -> Iterator[Case]:
    """Caches of more than 200 MB."""
    yield _case(*GROUPED)
    yield _case(32, 32, 8, 8192)
    yield _case(16, 32, 32, 4096)
    yield _case(1, 32, 8, 131072)
    yield _case(32, 32, 8, 8192, D=64)
    yield _case(32, 32, 8, 8192, ragged=True)


def small() -> Iterator[Case]:
    """Caches that would stay in L2, were there only one."""
    yield _case(1, 32, 8, 8192)
    yield _case(1, 32, 8, 1024)
    yield _case(4, 32, 8, 2048)
    yield _case(8, 16, 16, 1024)


def paged() -> Iterator[Case]:
    for page in (16, 64, 256):
        yield _case(*GROUPED, page=page)
    yield _case(32, 32, 8, 8192, D=64, page=16)
    yield _case(1, 32, 8, 8192, page=16)


def queries() -> Iterator[Case]:
    for Sq in (4, 16):
        yield _case(*GROUPED, Sq=Sq)


def cpu() -> Iterator[Case]:
    yield _case(4, 16, 4, 2048, D=64)


PRESETS = {"large": large, "small": small, "paged": paged, "queries": queries, "cpu": cpu}


def _jax_peer(function: Callable[[Case], Callable]) -> Callable[[Case, str, str], Timed]:
    """A peer from a maker of f(q, k_cache, v_cache, lengths, table); a program calls it on one cache after another."""

    def prepare(case: Case, dtype: str, direction: str) -> Timed:
        attend, make = function(case), jax.jit(jax.random.normal, static_argnums=(1, 2))

        def arguments(i: int) -> tuple:
            shapes = (case.B, case.Sq, case.H, case.D), *(_cache_shape(case, width) for width in (case.D, case.Dv))
            arrays = (make(jax.random.key(3 * i + n), shape, jnp.dtype(dtype)) for n, shape in enumerate(shapes))
            return *arrays, jnp.asarray(case.lengths), None if case.page is None else jnp.asarray(case.table())

        def one_after_another(calls: list) -> list:
            outs: list = []
            for q, *rest in calls:
                if outs:
                    q, _ = jax.lax.optimization_barrier((q, outs[-1]))
                outs.append(attend(q, *rest))
            return outs

        calls = [arguments(i) for i in range(case.copies(jnp.dtype(dtype).itemsize))]
        return Timed(functools.partial(jax.jit(one_after_another), calls), jax.block_until_ready)

    return prepare


def _torch_peer(function: Callable[[Case], Callable]) -> Callable[[Case, str, str], Timed]:
    """The same of a torch function, in a CUDA graph."""

    def prepare(case: Case, dtype: str, direction: str) -> Timed:
        import torch

        on_gpu = torch.cuda.is_available()
        attend, device = function(case), "cuda" if on_gpu else "cpu"
        make = functools.partial(torch.randn, device=device, dtype=getattr(torch, dtype))
        n, lengths = case.copies(jnp.dtype(dtype).itemsize), torch.tensor(case.lengths, device=device)
        q = make(case.B, case.Sq, case.H, case.D)
        caches = [[make(*_cache_shape(case, d)) for d in (case.D, case.Dv)] for _ in range(n)]

        def run():
            with torch.no_grad():
                return [attend(q, *kv, lengths) for kv in caches]

        if not on_gpu:
            return Timed(run, lambda _: None)
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
        return Timed(lambda: (graph.replay(), kept), lambda _: torch.cuda.synchronize())

    return prepare


def _cache_shape(case: Case, width: int) -> tuple[int, ...]:
    if case.page is None:
        return case.B, case.Sk, case.Hk, width
    return case.B * case.Sk // case.page, case.page, case.Hk, width


def _jflash(implementation: str | None, case: Case) -> Callable:
    def attend(q, k_cache, v_cache, lengths, table):
        layout = {"cache_seqlens": lengths, "block_table": table}
        return flash_attention_with_kvcache(
            q, k_cache, v_cache, causal=case.causal, implementation=implementation, **layout
        )[0]

    return attend


def _copy(case: Case) -> Callable:
    """Memory alone: reads the keys and writes as much, so that it moves the bytes of the cache."""
    if case.ragged or case.D != case.Dv:
        raise NotImplementedError("it would move more than the call reads")
    return lambda q, k_cache, v_cache, lengths, table: k_cache + jnp.ones((), k_cache.dtype)


def _fa3(case: Case) -> Callable:
    from fa3_fwd_interface import flash_attn_with_kvcache

    if case.page is not None:
        raise NotImplementedError("this build of FA3 is without pages")

    def attend(q, k_cache, v_cache, lengths):
        return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, causal=case.causal)

    return attend


def _sdpa(case: Case) -> Callable:
    """With the heads of a group as its queries, which reads the cache once."""
    import torch

    if case.Sq != 1 or case.ragged or case.page is not None:
        raise NotImplementedError("SDPA is without lengths and pages, and aligns causal masks to the top left")

    def attend(q, k_cache, v_cache, lengths):
        q = q.view(case.B, case.Hk, case.H // case.Hk, case.D)
        out = torch.nn.functional.scaled_dot_product_attention(q, k_cache.transpose(1, 2), v_cache.transpose(1, 2))
        return out.view(case.B, 1, case.H, case.Dv)

    return attend


BOTH = ("cpu", "cuda")
PEERS = (
    Peer("jflash", (), BOTH, _jax_peer(functools.partial(_jflash, None))),
    Peer("fa3:torch", ("fa3_fwd_interface",), ("cuda",), _torch_peer(_fa3)),
    Peer("torch SDPA", ("torch",), BOTH, _torch_peer(_sdpa)),
    Peer("jflash:xla", (), ("cuda",), _jax_peer(functools.partial(_jflash, "xla"))),
    Peer("copy", (), BOTH, _jax_peer(_copy)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run.add_arguments(parser, PRESETS, "all", directions=())


def main(args: argparse.Namespace) -> results.Report:
    peers, dtype, report = available(PEERS, args.impls), run.dtype(args), run.new_report()
    for preset in run.presets(args, *(name for name in PRESETS if name != "cpu")):
        for case in PRESETS[preset]():
            report.add(_measure(peers, case, dtype, args), args.out)
    results.show(report)
    return report


def _measure(peers: list[Peer], case: Case, dtype: str, args) -> list[results.Row]:
    shape, itemsize = dataclasses.asdict(case), jnp.dtype(dtype).itemsize
    n, size = case.copies(itemsize), case.bytes(itemsize)
    rows = []
    for name, spread in interleaved(ready(peers, case, dtype, "forward"), args.rounds, args.seconds).items():
        times: dict[str, Any] = {key: x / n for key, x in dataclasses.asdict(spread).items()}
        rows.append(results.Row("decode", "forward", name, dtype, shape, **times, gbps=size / times["ms"] / 1e6))
    line = "  ".join(f"{row.impl} {1e3 * row.ms:.1f}us {row.gbps:.0f}GB/s" for row in rows)
    print(f"{results.label(shape)} {size / 1e6:.0f}MB: {line}", flush=True)
    return rows

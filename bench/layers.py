"""`python -m bench layers`: norms, cross-entropy and dense layers, beside torch's own. Milliseconds."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import results, run
from bench.peers import Peer, available, ready
from bench.timing import Timed, interleaved
from jflash import layers


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of LAYERS on rows [rows, width]; dense layers have `hidden` features inside or at their end."""

    layer: str
    rows: int
    width: int
    hidden: int | None = None


def gpu() -> Iterator[Case]:
    """A model of width 4096 on 16k tokens."""
    for layer in ("rms_norm", "rms_norm + residual", "layer_norm"):
        yield Case(layer, 16384, 4096)
    yield Case("rms_norm", 65536, 1024)
    yield Case("cross_entropy", 8192, 128256)
    yield Case("cross_entropy", 16384, 32000)
    yield Case("dense", 16384, 4096, 4096)
    yield Case("mlp", 16384, 4096, 16384)


def cpu() -> Iterator[Case]:
    for layer in ("rms_norm", "layer_norm"):
        yield Case(layer, 2048, 1024)
    yield Case("cross_entropy", 512, 8192)
    yield Case("mlp", 512, 256, 1024)


PRESETS = {"gpu": gpu, "cpu": cpu}


def _shapes(case: Case) -> tuple[tuple[int, ...], ...]:
    """Of the arrays of floating point, x first. Dense weights are [in, out]."""
    x, n, m = (case.rows, case.width), case.width, case.hidden or 0
    return {
        "rms_norm": (x, (n,)),
        "rms_norm + residual": (x, (n,), x),
        "layer_norm": (x, (n,), (n,)),
        "cross_entropy": (x,),
        "dense": (x, (n, m), (m,)),
        "mlp": (x, (n, m), (m, n)),
    }[case.layer]


def _labels(case: Case) -> np.ndarray:
    return np.random.default_rng(0).integers(0, case.width, case.rows)


def _arrays(case: Case, dtype: str) -> tuple[jax.Array, ...]:
    """Standard normal; weights are divided by the root of their length."""
    make = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys, shapes = jax.random.split(jax.random.key(0), 4), _shapes(case)
    arrays = (make(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=False))
    return tuple(x / len(x) ** 0.5 if case.hidden and n and x.ndim == 2 else x for n, x in enumerate(arrays))


def _ours(case: Case) -> Callable:
    """f(x, ...) -> the outputs, of JAX arrays."""
    return {
        "rms_norm": layers.rms_norm,
        "rms_norm + residual": lambda x, w, r: layers.rms_norm(x, w, residual=r),
        "layer_norm": layers.layer_norm,
        "cross_entropy": lambda x: layers.cross_entropy(x, _labels(case))[0],
        "dense": layers.dense,
        "mlp": layers.mlp,
    }[case.layer]


def _jax(case: Case, dtype: str, direction: str) -> Timed:
    arrays, forward = _arrays(case, dtype), jax.jit(_ours(case))
    run = functools.partial(forward, *arrays)
    if direction == "both":
        both = jax.jit(lambda cotangents, *x: jax.vjp(_ours(case), *x)[1](cotangents))
        run = functools.partial(both, run(), *arrays)
    if jax.default_backend() == "cpu":  # as torch does there: each call is over before the next starts
        return Timed(lambda: jax.block_until_ready(run()), lambda _: None)
    return Timed(run, jax.block_until_ready)


def _torch_functions(case: Case, labels: Any) -> Callable:
    """The same of torch's own functions, whose dense weights are [out, in]."""
    from torch.nn import functional as F

    def with_residual(x, w, r):
        return F.rms_norm(x + r, w.shape, w, 1e-6), x + r

    return {
        "rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        "rms_norm + residual": with_residual,
        "layer_norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        "cross_entropy": lambda x: F.cross_entropy(x, labels, reduction="none"),
        "dense": lambda x, w, b: F.linear(x, w, b),
        "mlp": lambda x, w1, w2: F.linear(F.gelu(F.linear(x, w1), approximate="tanh"), w2),
    }[case.layer]


def _ours_in_torch(case: Case, labels: Any) -> Callable:
    from interop import layers as ours

    return {
        "rms_norm": lambda x, w: ours.rms_norm_fn(x, w),
        "rms_norm + residual": lambda x, w, r: ours.rms_norm_fn(x, w, None, r, prenorm=True),
        "layer_norm": lambda x, w, b: ours.layer_norm_fn(x, w, b, eps=1e-5),
        "cross_entropy": lambda x: ours.cross_entropy_loss(x, labels)[0],
        "dense": lambda x, w, b: ours.fused_dense_func(x, w, b),
        "mlp": lambda x, w1, w2: ours.fused_mlp_func(x, w1, w2),
    }[case.layer]


def _compiled(case: Case, labels: Any) -> Callable:
    import torch

    torch._dynamo.reset()  # each case is a program of its own, not one more shape of the last
    return torch.compile(_torch_functions(case, labels))


def _torch(functions: Callable[[Case, Any], Callable]) -> Callable[[Case, str, str], Timed]:
    """A peer from a maker of torch functions."""

    def prepare(case: Case, dtype: str, direction: str) -> Timed:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        move = lambda x: torch.from_numpy(np.array(x)).to(device)  # noqa: E731
        x = [move(x.astype(jnp.float32)).to(getattr(torch, dtype)) for x in _arrays(case, dtype)]
        if case.hidden:
            x = [t.T.contiguous() if n and t.ndim == 2 else t for n, t in enumerate(x)]
        run = functions(case, move(_labels(case)))
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None

        def forward():
            with torch.no_grad():
                return run(*x)

        def both():
            outs = run(*x)
            outs = outs if isinstance(outs, tuple) else (outs,)
            return torch.autograd.grad(outs, x, [out.detach() for out in outs])

        if direction == "both":
            x = [t.requires_grad_() for t in x]
        return Timed(forward if direction == "forward" else both, lambda _: wait())

    return prepare


BOTH = ("cpu", "cuda")
PEERS = (
    Peer("jflash", (), BOTH, _jax),
    Peer("jflash:torch", ("torch",), BOTH, _torch(_ours_in_torch)),
    Peer("torch", ("torch",), BOTH, _torch(_torch_functions)),
    Peer("torch.compile", ("torch", "triton"), ("cuda",), _torch(_compiled)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run.add_arguments(parser, PRESETS, "gpu", directions=("forward", "both"))


def main(args: argparse.Namespace) -> results.Report:
    peers, dtype, report = available(PEERS, args.impls), run.dtype(args), run.new_report(with_matmul=False)
    for preset in run.presets(args, "gpu"):
        for case in PRESETS[preset]():
            for direction in args.directions or ("forward", "both"):
                report.add(_measure(peers, case, dtype, direction, args), args.out)
    results.show(report)
    return report


def _measure(peers: list[Peer], case: Case, dtype: str, direction: str, args) -> list[results.Row]:
    shape = dataclasses.asdict(case)
    found = interleaved(ready(peers, case, dtype, direction), args.rounds, args.seconds)
    rows = [results.Row("layers", direction, name, dtype, shape, **dataclasses.asdict(x)) for name, x in found.items()]
    print(f"{results.label(shape)} {direction}: " + "  ".join(f"{r.impl} {r.ms:.3f}ms" for r in rows), flush=True)
    return rows

"""`python -m bench attention`: softmax attention over the shapes that the papers use."""

from __future__ import annotations

# pyright: reportMissingImports=false
import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bench import results, run
from bench.peers import Case, Peer, available, jax_peer, prepared, torch_peer
from bench.timing import Timed, interleaved
from jflash import flash_attention

TOKENS, WIDTH = 16384, 2048  # B * S and H * D of the sweep


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


FEATURES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "softcap": lambda case: {"softcap": 30.0},
    "alibi": lambda case: {"alibi_slopes": 2.0 ** -jnp.linspace(1, 8, case.H)},
    "segments": lambda case: {"segment_ids": _segments(case)},
    "sinks": lambda case: {"sinks": jnp.zeros(case.H)},
    "deterministic": lambda case: {"deterministic": True},
    "dropout": lambda case: {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
    "bias": lambda case: {"bias": jnp.zeros((1, case.H, case.Sq, case.Sk), jnp.bfloat16)},
    "mask": lambda case: {"mask": jnp.ones((case.B, 1, 1, case.Sk), bool)},
}


def _segments(case: Case) -> jax.Array:
    """Four of them, of equal length."""
    ids = jnp.arange(case.Sq, dtype=jnp.int32) * 4 // case.Sq
    return jnp.broadcast_to(ids, (case.B, case.Sq))


def _jflash(case: Case, **options) -> Callable:
    if case.feature is not None:
        options |= FEATURES[case.feature](case)
    return functools.partial(flash_attention, causal=case.causal, window=case.window, **options)


def _jax_nn(implementation: str, case: Case) -> Callable:
    if case.D != case.Dv:
        raise NotImplementedError("jax.nn wants one head dim")
    attend: Any = jax.nn.dot_product_attention
    return functools.partial(
        attend,
        is_causal=case.causal,
        local_window_size=case.window,
        implementation=implementation,
    )


def _tokamax(case: Case) -> Callable:
    import tokamax

    return functools.partial(
        tokamax.dot_product_attention, is_causal=case.causal, local_window_size=case.window, implementation="mosaic"
    )


def _jla(backward: str, case: Case) -> Callable:
    from jla.ops.mosaic_gpu.attention import flash_attention as jla

    if not case.causal or case.Sq != case.Sk:
        raise NotImplementedError("jla is causal self-attention")
    window = None if case.window is None else case.window[0] + 1
    return functools.partial(jla, sliding_window=window, backward=backward)


def _fa3_jax(case: Case) -> Callable:
    from dew_flash_attn import flash_mha

    return functools.partial(flash_mha, is_causal=case.causal, window_size=case.window or (-1, -1))


def _fa3_torch(case: Case) -> Callable:
    from fa3_fwd_interface import flash_attn_func

    return functools.partial(flash_attn_func, causal=case.causal, window_size=case.window or (-1, -1))


def _sdpa(backend: str | None, case: Case) -> Callable:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.window is not None or (case.causal and case.Sq != case.Sk):
        raise NotImplementedError("SDPA has no window and aligns causal masks to the top left")
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=case.causal, enable_gqa=case.H != case.Hk
    )
    if backend is None:
        return attend

    def chosen(*qkv):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return attend(*qkv)

    return chosen


def _peer(name: str, prepare: Any, *needs: str, devices=("cuda",), features=False) -> Peer:
    return Peer(name, needs, devices, prepare, features)


PEERS = (
    _peer("jflash", jax_peer(_jflash), devices=("cpu", "cuda"), features=True),
    _peer("jflash:deterministic", jax_peer(functools.partial(_jflash, deterministic=True))),
    _peer("fa3", jax_peer(_fa3_jax), "dew_flash_attn"),
    _peer("fa3:torch", torch_peer(_fa3_torch), "fa3_fwd_interface"),
    _peer("cudnn:jax", jax_peer(functools.partial(_jax_nn, "cudnn"))),
    _peer("cudnn:torch", torch_peer(functools.partial(_sdpa, "CUDNN_ATTENTION"), True), "torch"),
    _peer("fa2:torch", torch_peer(functools.partial(_sdpa, "FLASH_ATTENTION"), True), "torch"),
    _peer("tokamax", jax_peer(_tokamax), "tokamax"),
    _peer("jla:ranged", jax_peer(functools.partial(_jla, "ranged")), "jla"),
    _peer("jla:fused", jax_peer(functools.partial(_jla, "fused")), "jla"),
    _peer("torch SDPA", torch_peer(functools.partial(_sdpa, None), True), "torch", devices=("cpu",)),
    _peer("jax.nn", jax_peer(functools.partial(_jax_nn, "xla")), devices=("cpu", "cuda")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run.add_arguments(parser, PRESETS, "sweep")


def main(args: argparse.Namespace) -> results.Report:
    peers, dtype, report = available(PEERS, args.impls), run.dtype(args), run.new_report()
    cases = [case for preset in run.presets(args, "sweep") for case in PRESETS[preset]()]
    directions = run.directions(args, ("forward", "backward"), ("forward", "both"))
    for task, found in prepared(peers, itertools.product(cases, [dtype], directions)):
        report.add(_measure(found, *task, args), args.out)
    results.show(report)
    return report


def _measure(found: dict[str, Timed], case: Case, dtype: str, direction: str, args) -> list[results.Row]:
    shape = dataclasses.asdict(case)
    rows = []
    for name, spread in interleaved(found, args.rounds, args.seconds).items():
        tflops = case.flops(direction) / spread.ms / 1e9 if run.on_gpu() else None
        numbers = dataclasses.asdict(spread)
        rows.append(results.Row("attention", direction, name, dtype, shape, **numbers, tflops=tflops))
    line = "  ".join(f"{r.impl} {r.tflops:.0f}" if r.tflops else f"{r.impl} {r.ms:.1f}ms" for r in rows)
    print(f"{results.label(shape)} {direction}: {line}", flush=True)
    return rows

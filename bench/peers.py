"""The implementations that a benchmark runs side by side: ours and whatever else is installed.

A peer makes, for a case, a `Timed` for each direction it can do, or raises; the reason is printed.
"""

from __future__ import annotations

# pyright: reportMissingImports=false
import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.timing import Timed
from jflash import flash_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem. window: keys seen before a query's own."""

    B: int
    Sq: int
    Sk: int
    H: int
    Hk: int
    D: int
    Dv: int
    causal: bool = False
    window: tuple[int, int] | None = None
    feature: str | None = None  # one of FEATURES, of ours alone

    @property
    def visible(self) -> int:
        """Pairs of a query and a key it sees, a head: causal counts half, as the peers' papers do."""
        if self.window is not None:
            i = np.arange(self.Sq) + self.Sk - self.Sq
            high = np.minimum(i + (0 if self.causal else self.window[1]), self.Sk - 1)
            return int(np.maximum(high - np.maximum(i - self.window[0], 0) + 1, 0).sum())
        return self.Sq * self.Sk // (2 if self.causal else 1)

    def flops(self, direction: str) -> float:
        """Two products forward; backward counts 2.5 times that, whatever a kernel really does."""
        forward = 2.0 * self.B * self.H * self.visible * (self.D + self.Dv)
        return {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction] * forward


def jax_inputs(case: Case, dtype: str) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the output, standard normal."""
    shapes = (
        (case.B, case.Sq, case.H, case.D),
        (case.B, case.Sk, case.Hk, case.D),
        (case.B, case.Sk, case.Hk, case.Dv),
        (case.B, case.Sq, case.H, case.Dv),
    )
    keys = jax.random.split(jax.random.key(0), 4)
    make = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return tuple(make(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True))


def jax_peer(function: Callable[[Any], Callable], inputs: Callable = jax_inputs) -> Callable[[Any, str, str], Timed]:
    """A peer from a maker of functions f(q, k, v) -> out on [B, S, H, D], or of what else `inputs` gives."""

    def prepare(case: Any, dtype: str, direction: str) -> Timed:
        attend = function(case)
        *qkv, cotangent = inputs(case, dtype)
        if direction == "forward":
            run = functools.partial(jax.jit(attend), *qkv)
        elif direction == "both":
            run = functools.partial(jax.jit(functools.partial(_both, attend)), cotangent, *qkv)
        else:
            _, pull = jax.jit(functools.partial(jax.vjp, attend))(*qkv)
            run = functools.partial(jax.jit(lambda pull, ct: pull(ct)), pull, cotangent)
        if jax.default_backend() == "cpu":  # as torch does there: each call is over before the next starts
            return Timed(lambda: jax.block_until_ready(run()), lambda _: None)
        return Timed(run, jax.block_until_ready)

    return prepare


def _both(attend: Callable, cotangent: jax.Array, *qkv: jax.Array):
    """out too: a backward that needs nothing of the forward would leave XLA to drop that."""
    out, pull = jax.vjp(attend, *qkv)
    return out, pull(cotangent)


def torch_peer(function: Callable[[Any], Callable], heads_first: bool = False, inputs: Callable = jax_inputs):
    """A peer from a maker of torch functions f(q, k, v) -> out on [B, S, H, D], or on [B, H, S, D]."""

    def prepare(case: Any, dtype: str, direction: str) -> Timed:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        attend = function(case)
        tensors = []
        for x in inputs(case, dtype):
            t = torch.from_numpy(np.array(x, np.float32)).to(device, getattr(torch, x.dtype.name))
            tensors.append(t.transpose(1, 2).contiguous() if heads_first else t)
        *qkv, cotangent = tensors
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        if direction != "forward":
            qkv = [x.requires_grad_() for x in qkv]
        kept = attend(*qkv) if direction == "backward" else None

        def run():
            if direction == "forward":
                with torch.no_grad():
                    return attend(*qkv)
            out = attend(*qkv) if kept is None else kept
            return torch.autograd.grad(out, qkv, cotangent, retain_graph=kept is not None)

        return Timed(run, lambda _: wait())

    return prepare


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


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    needs: tuple[str, ...]  # modules
    devices: tuple[str, ...]
    prepare: Callable[[Case, str, str], Timed]
    features: bool = False  # of FEATURES

    def why_not(self, device: str) -> str | None:
        """Why it cannot run here at all."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)}"
        for module in self.needs:
            try:
                importlib.import_module(module)
            except Exception as error:
                return f"import {module}: {type(error).__name__}: {str(error)[:100]}"
        return None


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

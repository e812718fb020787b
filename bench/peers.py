"""The implementations that a benchmark runs side by side: ours and whatever else is installed.

A peer makes, for a case, a `Timed` for each direction it can do, or raises; the reason is printed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.timing import Timed


@dataclasses.dataclass(frozen=True)
class Shape:
    """The axes of a case, by the letters used everywhere."""

    B: int
    Sq: int
    Sk: int
    H: int
    Hk: int
    D: int
    Dv: int


@dataclasses.dataclass(frozen=True)
class Case(Shape):
    """One attention problem. window: keys seen before a query's own."""

    causal: bool = False
    window: tuple[int, int] | None = None
    feature: str | None = None  # one of bench.attention's FEATURES, of ours alone

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
            if direction == "forward":  # of tensors that want no gradient
                return attend(*qkv)
            out = attend(*qkv) if kept is None else kept
            return torch.autograd.grad(out, qkv, cotangent, retain_graph=kept is not None)

        return Timed(run, lambda _: wait())

    return prepare


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    needs: tuple[str, ...]  # modules
    devices: tuple[str, ...]
    prepare: Callable[[Case, str, str], Timed]
    features: bool = False  # whether it can have a case's feature

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


def available(peers: Iterable[Peer], wanted: list[str] | None) -> list[Peer]:
    """Those that can run here, of all or of the wanted names; says why of the others."""
    found, device = [], "cuda" if jax.default_backend() == "gpu" else "cpu"
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
        if getattr(case, "feature", None) is not None and not peer.features:
            continue
        try:
            timed = peer.prepare(case, dtype, direction)
            timed.wait(timed.run())
            found[peer.name] = timed
        except Exception as error:
            print(f"  {peer.name} {direction}: {type(error).__name__}: {str(error)[:160]}".replace("\n", " "))
    return found


def prepared(
    peers: Iterable[Peer], tasks: Iterable[tuple[Any, str, str]]
) -> Iterator[tuple[tuple[Any, str, str], dict[str, Timed]]]:
    """Each task, a case, dtype and direction, with the peers that are `ready` for it.

    On a GPU JAX compiles some tasks side by side, which takes longer than to time them.
    """
    of_torch = [peer for peer in peers if "torch" in peer.name]
    of_jax = [peer for peer in peers if peer not in of_torch]
    at_once, tasks = 16 if jax.default_backend() == "gpu" else 1, list(tasks)
    for start in range(0, len(tasks), at_once):
        batch = tasks[start : start + at_once]
        with ThreadPoolExecutor(at_once) as pool:
            found = list(pool.map(lambda task: ready(of_jax, *task), batch))
        for task, timed in zip(batch, found, strict=True):
            yield task, timed | ready(of_torch, *task)

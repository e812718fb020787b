"""The backends, best first, and the choice between them.

A backend says why it cannot take a problem, or None. `choose` takes the first that can do the forward *and*
the backward, so that a missing backward never surfaces in the middle of a training run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.core import Tracer

from jflash import cudnn, l1_reference, linear_reference, reference, xla
from jflash._transforms import by_standard_rules
from jflash.xla import decode
from jflash.xla import l1 as xla_l1
from jflash.xla import linear as xla_linear
from pallas_kernels import hopper
from pallas_kernels.hopper import cache as hopper_cache
from pallas_kernels.hopper import l1 as hopper_l1
from pallas_kernels.hopper import linear as hopper_linear
from pallas_kernels.problem import AttentionProblem, L1Problem, LinearProblem

Problem = AttentionProblem | LinearProblem
Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Backend:
    """What runs one family of problems.

    Softmax and L1: forward(problem, arrays) -> (out, lse); backward(problem, arrays, out, lse, d_out, d_lse) ->
    gradients.
    Linear: forward(problem, arrays) -> LinearResults; backward(problem, arrays, out, norm, d_out, d_kv, d_z) ->
    gradients.
    """

    name: str
    why_not: Callable[[Any, Direction], str | None]
    forward: Callable
    backward: Callable | None  # None: by autodiff


def _backend(name: str, why_not, forward: Callable, backward: Callable | None) -> Backend:
    return Backend(name, why_not, by_standard_rules(forward), backward and by_standard_rules(backward))


def _always(problem: Problem, direction: Direction) -> None:
    """Takes every problem."""


BACKENDS = (
    _backend("hopper", hopper.why_not, hopper.forward, hopper.backward),
    _backend("cudnn", cudnn.why_not, cudnn.forward, cudnn.backward),
    _backend("xla", _always, xla.forward, xla.backward),
    _backend("reference", _always, reference.attention, None),
)
LINEAR = (
    _backend("hopper", hopper_linear.why_not, hopper_linear.forward, hopper_linear.backward),
    _backend("xla", _always, xla_linear.forward, xla_linear.backward),
    _backend("reference", _always, linear_reference.linear_attention, None),
)
L1 = (
    _backend("hopper", hopper_l1.why_not, hopper_l1.forward, hopper_l1.backward),
    _backend("xla", _always, xla_l1.forward, xla_l1.backward),
    _backend("reference", _always, l1_reference.l1_attention, None),
)

CACHE = (  # softmax attention on a cache: forward only
    _backend("hopper", hopper_cache.why_not, hopper_cache.forward, None),
    _backend("xla", _always, decode.forward, None),
    _backend("reference", _always, reference.attention_on_cache, None),
)


def attending(problem: AttentionProblem) -> tuple[Backend, ...]:
    """The backends of a problem's family: softmax or L1."""
    return L1 if isinstance(problem, L1Problem) else BACKENDS


def get(name: str, among: tuple[Backend, ...] = BACKENDS) -> Backend:
    """The backend of that name; ValueError lists the names."""
    for backend in among:
        if backend.name == name:
            return backend
    names = ", ".join(repr(backend.name) for backend in among)
    raise ValueError(f"implementation={name!r} must be None or one of {names}")


def why_not(backend: Backend, problem: Problem) -> str | None:
    """The first reason, over both directions, why a backend cannot take a problem."""
    reasons = (backend.why_not(problem, direction) for direction in DIRECTIONS)
    return next((reason for reason in reasons if reason), None)


def choose(problem: Problem, implementation: str | None, among: tuple[Backend, ...] = BACKENDS) -> str:
    """The name of the backend that will run: the one asked for, or the first that can."""
    if implementation is None:
        return next(backend.name for backend in among if why_not(backend, problem) is None)
    reason = why_not(get(implementation, among), problem)
    if reason:
        raise NotImplementedError(f"implementation={implementation!r} cannot take this call: {reason}")
    return implementation


def explain(problem: Problem, among: tuple[Backend, ...] = BACKENDS) -> str:
    """One line for each backend and direction: used, free to use, or why not."""
    chosen = choose(problem, None, among)
    return "\n".join(
        f"{backend.name:<10} {direction:<9} {_verdict(backend, problem, direction, chosen)}"
        for backend in among
        for direction in DIRECTIONS
    )


def _verdict(backend: Backend, problem: Problem, direction: Direction, chosen: str) -> str:
    reason = backend.why_not(problem, direction)
    if reason:
        return f"no: {reason}"
    if backend.name == chosen:
        return "used"
    only = why_not(backend, problem) is not None
    return f"can, but only {direction}" if only else "can, but a faster backend is used"


def target_of(x: jax.Array) -> str:
    """Where a call on x will run: "cpu", "tpu", or a compute capability such as "sm_90".

    A tracer does not say, so under jit it is the default device.
    """
    if isinstance(x, Tracer) or not isinstance(x, jax.Array):
        device = jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    else:
        device = next(iter(x.devices()))
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    if device.platform != "gpu":
        return device.platform
    return "sm_" + str(getattr(device, "compute_capability", "unknown")).replace(".", "")

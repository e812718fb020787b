"""The backends, best first, and the choice between them.

A backend says why it cannot take a problem, or None. `choose` takes the first that can do the forward *and*
the backward, so that a missing backward never surfaces in the middle of a training run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax

from jflash import reference, xla
from pallas_kernels import hopper
from pallas_kernels.problem import AttentionProblem

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Backend:
    """forward(problem, arrays) -> (out, lse); backward(problem, arrays, out, lse, d_out, d_lse) -> gradients."""

    name: str
    why_not: Callable[[AttentionProblem, Direction], str | None]
    forward: Callable
    backward: Callable | None  # None: by autodiff


def _always(problem: AttentionProblem, direction: Direction) -> None:
    """Takes every problem."""


BACKENDS = (
    Backend("hopper", hopper.why_not, hopper.forward, hopper.backward),
    Backend("xla", _always, xla.forward, xla.backward),
    Backend("reference", _always, reference.attention, None),
)


def get(name: str) -> Backend:
    """The backend of that name; ValueError lists the names."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    names = ", ".join(repr(backend.name) for backend in BACKENDS)
    raise ValueError(f"implementation={name!r} must be None or one of {names}")


def why_not(backend: Backend, problem: AttentionProblem) -> str | None:
    """The first reason, over both directions, why a backend cannot take a problem."""
    reasons = (backend.why_not(problem, direction) for direction in DIRECTIONS)
    return next((reason for reason in reasons if reason), None)


def choose(problem: AttentionProblem, implementation: str | None) -> str:
    """The name of the backend that will run: the one asked for, or the first that can."""
    if implementation is None:
        return next(backend.name for backend in BACKENDS if why_not(backend, problem) is None)
    reason = why_not(get(implementation), problem)
    if reason:
        raise NotImplementedError(f"implementation={implementation!r} cannot take this call: {reason}")
    return implementation


def target_of(x: jax.Array) -> str:
    """Where a call on x will run: "cpu", "tpu", or a compute capability such as "sm_90".

    A tracer does not say, so under jit it is the default device.
    """
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        device = jax.config.jax_default_device or jax.local_devices()[0]
    else:
        device = next(iter(x.devices()))
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    if device.platform != "gpu":
        return device.platform
    return "sm_" + str(getattr(device, "compute_capability", "unknown")).replace(".", "")

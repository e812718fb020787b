"""Runs the kernels of a GPU in the interpreter, on a machine without one."""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from unittest import mock

import jax

from pallas_kernels.hopper import attention_forward, attention_gradients
from tests.kernels import interpreter
from tests.kernels.calls import on_hopper


@contextlib.contextmanager
def interpreted(*calls: tuple[ModuleType, str]):
    """The hopper backend runs, with these functions interpreted. Fails on a race, also where JAX only records it."""
    params = interpreter.params()
    interpreter.reset()
    jax.clear_caches()
    with contextlib.ExitStack() as patches:
        for module, name in calls:
            call = functools.partial(getattr(module, name), interpret=params)
            patches.enter_context(mock.patch.object(module, name, call))
        patches.enter_context(on_hopper())
        yield
    jax.clear_caches()
    assert not interpreter.found_races(), "the race detector found a race"


hopper_on_the_cpu = functools.partial(
    interpreted, (attention_forward, "attention_forward"), (attention_gradients, "attention_gradients")
)

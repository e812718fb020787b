"""Compilation is most of what these tests take; what they compile runs once."""

import jax
import pytest


@pytest.fixture(autouse=True)
def compiled_for_one_run(request):
    if request.module.__name__.endswith("test_cost"):
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

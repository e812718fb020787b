"""How close jflash must be to a framework's own attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracle import assert_close

RUNS_ONCE = {"xla_backend_optimization_level": 0}  # compiles in half the time


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same_function(theirs, ours, arrays) -> None:
    """ours(arrays) and its gradient, for a random cotangent, are theirs to 1e-11, both computed in float64.

    For implementation="reference", which defines what the others compute; tests/parity holds them to it.
    """
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda y: np.asarray(y, np.float64), arrays)
        x, ref = out_and_gradients(ours, wide), out_and_gradients(theirs, wide)
    for path, a, b in _pairs(x, ref):
        assert a.dtype == b.dtype == np.float64
        assert a.shape == b.shape, f"{path}: shape {a.shape}, theirs {b.shape}"
        worst = np.abs(a - b).max()
        assert worst <= 1e-11, f"{path}: max error {worst:.3g} of values up to {np.abs(b).max():.3g}"


def assert_as_accurate(theirs, ours, arrays, low=None) -> None:
    """The rule of `tests.oracle`, with theirs in float64 as ref, and `low`, default theirs, as lo."""
    dtype = jax.tree.leaves(arrays)[0].dtype
    x, lo = out_and_gradients(ours, arrays), out_and_gradients(low or theirs, arrays)
    with jax.enable_x64(True):
        ref = out_and_gradients(theirs, jax.tree.map(lambda y: np.asarray(y, np.float64), arrays))
    for (path, a, b), (_, c, _) in zip(_pairs(x, ref), _pairs(lo, ref), strict=True):
        assert a.dtype == dtype
        assert_close(path, a, c, b, dtype)


def out_and_gradients(attend, arrays) -> dict:
    """{"out": attend(arrays), "d": its gradient for a random cotangent}, as numpy arrays."""

    def run(arrays):
        out, pull = jax.vjp(attend, arrays)
        cotangent = np.random.default_rng(99).normal(size=out.shape)
        return {"out": out, "d": pull(jnp.asarray(cotangent, out.dtype))[0]}

    return jax.tree.map(np.asarray, jax.jit(run, compiler_options=RUNS_ONCE)(arrays))


def _pairs(x, ref) -> list:
    """(name, leaf, leaf) of two trees that must have one structure."""
    assert jax.tree.structure(x) == jax.tree.structure(ref)
    names = (jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ref))
    return list(zip(names, jax.tree.leaves(x), jax.tree.leaves(ref), strict=True))

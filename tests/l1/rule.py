"""The rule of tests.oracle for any function of arrays: each output and each gradient, for random cotangents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracle import assert_close

RUNS_ONCE = {"xla_backend_optimization_level": 0}  # compiles in half the time


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(seed: int, dtype=jnp.float32, *, B=1, Sq=50, Sk=None, H=2, Hk=None, D=20, Dv=None) -> dict:
    """Random q, k, v. Every fourth key feature is that of some query: a tie, whose sign is 0."""
    Sk, Hk, Dv = Sk or Sq, Hk or H, Dv or D
    q, k, v = normal(seed, B, Sq, H, D), normal(seed + 1, B, Sk, Hk, D), normal(seed + 2, B, Sk, Hk, Dv)
    k = k.at[..., ::4].set(q[:, jnp.arange(Sk) % Sq, : H : H // Hk, ::4])
    return {name: x.astype(dtype) for name, x in {"q": q, "k": k, "v": v}.items()}


def assert_same(ours, oracle, arrays: dict) -> None:
    """ours(arrays) and its gradients are within the rule of oracle(arrays), in float64 and in the arrays' dtype."""
    dtype = arrays["q"].dtype
    x, low = outputs_and_gradients(ours, arrays), outputs_and_gradients(oracle, arrays)
    with jax.enable_x64(True):
        ref = outputs_and_gradients(oracle, jax.tree.map(lambda y: np.asarray(y, np.float64), arrays))
    assert jax.tree.map(lambda y: y.dtype, x) == jax.tree.map(lambda y: y.dtype, low)
    names = (jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ref))
    for name, *three in zip(names, *map(jax.tree.leaves, (x, low, ref)), strict=True):
        assert_close(name, *three, dtype)


def outputs_and_gradients(f, arrays):
    """{"out": f(arrays), "d": its gradient for random cotangents}, as numpy arrays."""

    def run(arrays):
        out, pull = jax.vjp(f, arrays)
        leaves, tree = jax.tree.flatten(out)
        rng = np.random.default_rng(99)
        cotangents = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
        return {"out": out, "d": pull(jax.tree.unflatten(tree, cotangents))[0]}

    return jax.tree.map(np.asarray, jax.jit(run, compiler_options=RUNS_ONCE)(arrays))

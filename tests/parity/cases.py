"""Random operands beside q, k and v, and gradients for random cotangents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def booleans(seed: int, *shape: int, share: float = 0.6) -> jax.Array:
    """True for that share."""
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape) < share)


def segments(seed: int, B: int, S: int, count: int = 4) -> jax.Array:
    """Ascending segment ids [B, S], with borders at random places."""
    ids = np.sort(np.random.default_rng(seed).integers(0, count, size=(B, S)), axis=1)
    return jnp.asarray(ids, jnp.int32)


def slopes(seed: int, *shape: int) -> jax.Array:
    """ALiBi slopes in (0, 0.3)."""
    return jnp.asarray(np.random.default_rng(seed).uniform(0, 0.3, size=shape), jnp.float32)


def outputs_and_gradients(f):
    """Of arrays and cotangents, by default random ones: f(arrays) and the gradients. Compiled once, quickly."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(arrays, cotangents=None):
        outputs, pull = jax.vjp(f, arrays)
        leaves, tree = jax.tree.flatten(outputs)
        if cotangents is None:
            cotangents = [normal(90 + n, *x.shape, dtype=x.dtype) for n, x in enumerate(leaves)]
        return outputs, *pull(jax.tree.unflatten(tree, cotangents))

    return run

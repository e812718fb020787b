"""Counter-based dropout: whether a score is kept depends on (seed, b, h, i, j) and on nothing else.

Two 32-bit keys are hashed for each row (b, h, i); each column j is hashed into them. Tiles, backends and
sharding never enter, so every backend and both directions see one mask. The same lines run in the oracle, in
XLA and, on words of MLIR, inside a kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

WEYL = 0x9E3779B9  # 2^32 / golden ratio


def batch_seeds(key: jax.Array, batch: int) -> jax.Array:
    """Two seed words for each batch entry, uint32 [batch, 2], from a JAX random key."""
    words = jax.random.bits(key, (2,), jnp.uint32)
    b = jnp.arange(batch, dtype=jnp.uint32)
    return jnp.stack([_mix(words[0] + b * jnp.uint32(WEYL)), _mix(words[1] ^ _mix(b))], axis=-1)


def seeds_from_head(seeds: jax.Array, head) -> jax.Array:
    """The seeds with which heads counted from 0 have the masks of the heads from `head` on."""
    return seeds.at[:, 0].add(jnp.uint32(WEYL) * jnp.asarray(head, jnp.uint32))


def row_keys(seed0: jax.Array, seed1: jax.Array, h: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two keys of row i of head h; arguments broadcast, all uint32."""
    first = _mix(_mix(seed0 + h * jnp.uint32(WEYL)) + i * jnp.uint32(WEYL))
    return first, _mix(first ^ seed1)


def keep(first: jax.Array, second: jax.Array, j: jax.Array, rate: float) -> jax.Array:
    """True where column j of the row with these keys survives, with probability 1 - rate."""
    return survives(first + j * np.uint32(WEYL), second, rate)


def survives(x, second, rate: float):
    """`keep` of x = first + j WEYL; takes arrays of uint32, or anything with their operators."""
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = x ^ second
    x = (x ^ (x >> 15)) * np.uint32(0x735A2D97)
    return x >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers with good avalanche (constants: github.com/skeeto/hash-prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)

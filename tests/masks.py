"""Masks whose tiles are unlike each other."""

import jax
import jax.numpy as jnp
import numpy as np


def blocks(*shape: int, size: int = 64) -> jax.Array:
    """A mask [B, H, Sq, Sk] of which tiles of `size` show all, nothing or some."""
    rng = np.random.default_rng(5)
    tiles = rng.integers(0, 3, (*shape[:2], *(-(-n // size) for n in shape[2:])))
    each = np.repeat(np.repeat(tiles, size, 2), size, 3)[:, :, : shape[2], : shape[3]]
    return jnp.asarray(np.where(each == 2, rng.random(shape) < 0.5, each == 1))

"""What each thread does with rows of q and k: the code that the interpreter does not run."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.parts import l1_distances, l1_gradients, l1_maxima, l1_signs, swizzled_rows
from tests.kernels import threads

FACTOR = -0.125


def rows(seed: int, head_dim: int, dtype=np.float32) -> np.ndarray:
    """64 of them, of few values: many tie."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-9, 10, (64, head_dim)) * 2.0 ** rng.integers(-2, 2, (64, head_dim))).astype(dtype)


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def distances(x, y) -> np.ndarray:
    return np.abs(wide(x)[:, None] - wide(y)[None]).sum(axis=-1)


def gradient(x, y, ds) -> np.ndarray:
    return FACTOR * (wide(ds)[:, :, None] * np.sign(wide(x)[:, None] - wide(y)[None])).sum(axis=1)


def crossed(x: np.ndarray) -> np.ndarray:
    return np.asarray(swizzled_rows.crossed(jnp.asarray(x)))


@pytest.mark.parametrize("head_dim", [32, 64])
def test_distances(head_dim):
    x, y, memory = [rows(1, head_dim), rows(2, head_dim)], rows(3, head_dim), threads.Memory()
    with threads.running(memory):
        tiles = [memory.tile(crossed(each)) for each in x]
        found = l1_distances._distances(64, None, memory.tile(y), *tiles)
    for each, negative in zip(x, found, strict=True):
        np.testing.assert_array_equal(threads.array(negative), -distances(each, y))


def test_maxima():
    x, y, memory = [rows(1, 64, jnp.bfloat16), rows(2, 64, jnp.bfloat16)], rows(3, 64, jnp.bfloat16), threads.Memory()
    with threads.running(memory):
        tiles = [memory.tile(crossed(each)) for each in x]
        found = l1_maxima._sums(64, "bfloat16", None, memory.tile(y), *tiles)
    for each, maxima in zip(x, found, strict=True):
        expected = np.maximum(wide(each)[:, None], wide(y)[None]).sum(axis=-1)
        np.testing.assert_array_equal(threads.array(maxima), expected)


def test_gradients():
    x, y, memory = rows(1, 64), rows(2, 64), threads.Memory()
    ds = np.random.default_rng(3).integers(-8, 9, (64, 64)).astype(np.float32)
    with threads.running(memory):
        x_ref, room = memory.tile(crossed(x)), memory.flat(4 * 68 * 64, (68, 64))
        sums = threads.registers(np.zeros((64, 64)))
        of_ds, y_ref = threads.registers(ds), memory.tile(y)
        sums = l1_gradients._add(None, sums, of_ds, room, x_ref, y_ref)
        memory.bytes[room.at : room.at + 256] = ds.sum(axis=1).view(np.uint8)
        l1_gradients._finish(FACTOR, sums, room, x_ref)
    np.testing.assert_array_equal(memory.read_tile(x_ref, 64, 2, np.float32), gradient(x, y, ds))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_signs(head_dim):
    x, y, memory = rows(1, head_dim, jnp.bfloat16), rows(2, head_dim, jnp.bfloat16), threads.Memory()
    x[3], y[5] = -0.0, 0.0
    x[7, :8], y[9, :8] = 2.0**32, -(2.0**32)
    ds = np.random.default_rng(3).integers(-8, 9, (64, 64)).astype(np.float32)
    with threads.running(memory):
        x_ref = memory.tile(np.asarray(l1_signs.still(jnp.asarray(x)[None, :, None]))[0, :, 0])
        y_ref = memory.tile(np.asarray(l1_signs.passing(jnp.asarray(y)[None, :, None]))[0, :, 0])
        room, sums = memory.flat(256, (1, 64)), threads.registers(np.zeros((64, head_dim)))
        sums = l1_signs._add(None, sums, threads.registers(ds, jnp.bfloat16), x_ref, y_ref)
        memory.bytes[room.at : room.at + 256] = ds.sum(axis=1).view(np.uint8)
        l1_signs._finish(FACTOR, sums, room, x_ref)
    np.testing.assert_array_equal(memory.read_tile(x_ref, 64, head_dim // 32, np.float32), gradient(x, y, ds))


def test_integers_are_in_the_order_of_the_numbers():
    x = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16).astype(np.float32)
    x = np.sort(x[np.isfinite(x)])
    found = np.asarray(l1_signs._integers(jnp.asarray(x, jnp.bfloat16)))
    assert found.min() == -found.max() == 1 - (1 << 14)
    size = np.abs(x)
    kept = (size >= 2.0**-94) & (size < 2.0**32)
    steps, apart = np.diff(found), np.diff(x) > 0
    assert (steps >= 0).all()
    assert (steps > 0)[kept[1:] & apart].all()
    assert not steps[~apart].any()


def test_memory_of_signs_keeps_the_features():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 3, 100)), jnp.bfloat16)
    found = np.asarray(l1_signs.still(x))[1, :, 2].reshape(64, -1, 32).swapaxes(0, 1)
    expected = np.asarray(l1_signs._integers(x))[1, :, 2] + 1
    np.testing.assert_array_equal(l1_signs._of_memory(jnp.asarray(found))[:, :100], expected)

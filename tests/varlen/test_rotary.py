"""apply_rotary against its definition as a product of complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import apply_rotary
from tests.parity.cases import normal, outputs_and_gradients
from tests.varlen.rule import cu_seqlens

R = 12


def tables(positions=40, dtype=jnp.float32):
    angle = np.arange(positions)[:, None] * 100.0 ** -(np.arange(R // 2) / (R // 2))
    return jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)


def by_definition(x, positions, interleaved):
    """Pairs as complex numbers, times exp(i angle), in float64."""
    cos, sin = (np.asarray(t, np.float64)[np.asarray(positions)][..., None, :] for t in tables())
    x = np.array(x, np.float64)
    a = x[..., 0:R:2] if interleaved else x[..., : R // 2]
    b = x[..., 1:R:2] if interleaved else x[..., R // 2 : R]
    z = (a + 1j * b) * (cos + 1j * sin)
    if interleaved:
        x[..., 0:R:2], x[..., 1:R:2] = z.real, z.imag
    else:
        x[..., :R] = np.concatenate([z.real, z.imag], axis=-1)
    return x


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 7, [3, 0, 11]], ids=str)
def test_values(offsets, interleaved):
    x = normal(0, 3, 9, 2, 16)
    positions = np.broadcast_to(np.asarray(offsets).reshape(-1, 1) + np.arange(9), (3, 9))
    found = apply_rotary(x, *tables(), interleaved=interleaved, offsets=jnp.asarray(offsets))
    np.testing.assert_allclose(found, by_definition(x, positions, interleaved), atol=1e-6)


@pytest.mark.parametrize("offsets", [4, [0, 9, 2]], ids=str)
def test_packed_sequences(offsets):
    """A token's position is counted from the start of its sequence."""
    x, cu = normal(1, 14, 2, 16), cu_seqlens(5, 0, 7)
    each = np.broadcast_to(offsets, 3)
    positions = np.concatenate([each[0] + np.arange(5), each[2] + np.arange(7), np.zeros(2, int)])
    found = jax.jit(lambda x, cu: apply_rotary(x, *tables(), offsets=jnp.asarray(offsets), cu_seqlens=cu))(x, cu)
    np.testing.assert_allclose(found, by_definition(x, positions, False), atol=1e-6)


def test_gradient_is_the_rotation_back():
    """A rotation is orthogonal: turning by the negative angle undoes it."""
    cos, sin = tables()
    turn = lambda x: apply_rotary(x, cos, sin, interleaved=True)  # noqa: E731
    _, gradient = outputs_and_gradients(turn)(normal(2, 2, 9, 3, 16))
    back = apply_rotary(normal(90, 2, 9, 3, 16), cos, -sin, interleaved=True)
    np.testing.assert_allclose(gradient, back, atol=1e-6)


def test_sixteen_bits_are_turned_in_float32():
    x, (cos, sin) = normal(3, 1, 9, 2, 16, dtype=jnp.bfloat16), tables()
    found = apply_rotary(x, cos, sin)
    assert found.dtype == jnp.bfloat16
    assert jnp.array_equal(found, apply_rotary(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16))


def test_a_position_without_a_row():
    with pytest.raises(ValueError, match=r"positions 35 to 43 must be in \[0, 40\)"):
        apply_rotary(normal(4, 1, 9, 2, 16), *tables(), offsets=35)
    late = jax.jit(lambda x, n: apply_rotary(x, *tables(), offsets=n))(normal(4, 1, 9, 2, 16), 35)
    assert jnp.isfinite(late[:, :5]).all()
    assert jnp.isnan(late[:, 5:, :, :R]).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.zeros((9, 2, 16))}, r"x.shape=\(9, 2, 16\) must be \[batch, seq, heads, dim\]"),
        ({"x": jnp.zeros((1, 9, 2, 8))}, "rotary dim R=12, twice the width of cos, must be <= head_dim=8"),
        ({"sin": jnp.zeros((40, 5))}, r"cos.shape=\(40, 6\) and sin.shape=\(40, 5\) must be one"),
        ({"offsets": jnp.zeros(2, jnp.int32)}, r"offsets.shape=\(2,\) must be \(\) or \[1\]"),
        ({"offsets": 1.5}, "offsets.dtype=float32 must be an integer type"),
        ({"x": jnp.zeros((1, 9, 2, 16), int)}, "x.dtype=int32 must be one of bfloat16"),
        ({"interleaved": "neox"}, "interleaved='neox' must be True or False"),
        ({"x": jnp.zeros((9, 2, 16)), "cu_seqlens": np.int32(9)}, r"cu_seqlens.shape=\(\) must be \[N \+ 1\]"),
    ],
)
def test_errors(changed, message):
    arrays = {"x": normal(5, 1, 9, 2, 16), "cos": tables()[0], "sin": tables()[1], **changed}
    with pytest.raises((ValueError, TypeError), match=message):
        apply_rotary(**arrays)

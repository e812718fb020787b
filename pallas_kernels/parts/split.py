"""A float32 product on tensor cores: each operand as a sum of 16-bit numbers, and the products that matter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def in_memory(x: jax.Array, parts: int) -> jax.Array:
    """x [B, ...] -> [parts * B, ...]: in bfloat16 its parts, each what the ones before left over; x itself if one."""
    if parts == 1:
        return x
    found = []
    for _ in range(parts):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(jnp.bfloat16))
        x = x - part
    return jnp.concatenate(found)


def in_registers(x: jax.Array, parts: int, dtype) -> list[jax.Array]:
    """x in float32 -> its parts in a 16-bit dtype, all but the last cut off rather than rounded: that is cheaper."""
    found = []
    for _ in range(parts - 1):
        bits = lax.bitcast_convert_type(x, jnp.int32) & -65536
        part = lax.bitcast_convert_type(bits, jnp.float32)
        found.append(part.astype(dtype))
        x = x - part
    return [*found, x.astype(dtype)]


def products(parts: int) -> list[tuple[int, int]]:
    """Which parts to multiply, smallest products first; what is left out is below a rounding of float32."""
    pairs = [(m, n) for m in range(parts) for n in range(parts) if m + n < parts]
    return sorted(pairs, key=sum, reverse=True)

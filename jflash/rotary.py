"""Rotary position embedding: pairs of features turned by an angle that grows with the position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jflash import _key_ranges
from jflash._arguments import DTYPES, array, flag
from jflash._transforms import by_standard_rules


@by_standard_rules
def apply_rotary(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    interleaved: bool = False,
    offsets: int | jax.Array = 0,
    cu_seqlens: jax.Array | None = None,
) -> jax.Array:
    """Turns each pair (a, b) of features of a token at position t: `(a cos[t] - b sin[t], a sin[t] + b cos[t])`.

    Args:
        x: [B, S, H, D], or [T, H, D] with cu_seqlens, floating point. The first R of its D features are turned, the
            others kept.
        cos, sin: [positions, R / 2], R <= D.
        interleaved: pairs are (0, 1), (2, 3) ... (GPT-J) rather than (0, R/2), (1, R/2 + 1) ... (NeoX, Llama).
        offsets: position of the first token of each sequence: an integer, or integers [B]. A position that cos
            does not have is an error, and NaN where it is not known before the call runs.
        cu_seqlens: integers [N + 1], where packed sequences start; then offsets are [N] or an integer.

    Returns:
        x, turned in float32 or wider, in its dtype and shape. Differentiable.

    Raises:
        ValueError, TypeError: a shape or dtype breaks a rule above, or a position is outside of cos.

    Source: Su et al., RoFormer (arXiv 2104.09864).
    """
    x, offsets = array("x", x), jnp.asarray(offsets)
    if x.ndim != (4 if cu_seqlens is None else 3):
        axes = "[batch, seq, heads, dim]" if cu_seqlens is None else "[tokens, heads, dim] with cu_seqlens"
        raise ValueError(f"x.shape={x.shape} must be {axes}")
    if not jnp.issubdtype(offsets.dtype, jnp.integer):
        raise TypeError(f"offsets.dtype={offsets.dtype.name} must be an integer type")
    offsets = offsets.astype(jnp.int32)
    if cu_seqlens is not None:
        cu_seqlens = jnp.asarray(_key_ranges.check_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0]))
    row = jnp.arange(x.shape[-3], dtype=jnp.int32)
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if offsets.shape not in ((), (count,)):
        raise ValueError(f"offsets.shape={offsets.shape} must be () or [{count}], one for each sequence")
    if cu_seqlens is None:
        return rotate(x, cos, sin, offsets.reshape(-1, 1) + row, interleaved)
    sequence = _key_ranges.sequence_of(row, cu_seqlens)
    present = row < cu_seqlens[-1]
    positions = row - cu_seqlens[sequence] + (offsets if offsets.ndim == 0 else offsets[sequence])
    return rotate(x[None], cos, sin, jnp.where(present, positions, 0)[None], interleaved)[0]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, positions: jax.Array, interleaved: bool) -> jax.Array:
    """`apply_rotary` of x [B, S, H, D] at positions [B|1, S]."""
    interleaved = flag("interleaved", interleaved)
    if x.dtype.name not in DTYPES:
        raise TypeError(f"x.dtype={x.dtype.name} must be one of {', '.join(DTYPES)}")
    cos, sin = array("cos", cos), array("sin", sin)
    check_tables(x.shape[-1], cos, sin)
    if not isinstance(positions, Tracer) and positions.size:
        low, high = int(np.min(positions)), int(np.max(positions))
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions {low} to {high} must be in [0, {cos.shape[0]}), the rows of cos")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (
        t.astype(wide).at[positions].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)[:, :, None]
        for t in (cos, sin)
    )
    R = 2 * cos.shape[-1]
    turned, kept = x[..., :R].astype(wide), x[..., R:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = jnp.split(turned, 2, axis=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    turned = jnp.stack(pair, axis=-1).reshape(turned.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), kept], axis=-1)


def check_tables(head_dim: int, cos, sin) -> None:
    """cos and sin are [positions, R / 2] with R <= head_dim."""
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(f"cos.shape={cos.shape} and sin.shape={sin.shape} must be one [positions, R / 2]")
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(f"rotary dim R={2 * cos.shape[1]}, twice the width of cos, must be <= head_dim={head_dim}")

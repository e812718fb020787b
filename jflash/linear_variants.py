"""The published models that are linear attention with one decay or another, and their decays.

Each returns what `linear_attention` returns, takes its other options, and raises as it does.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jflash._transforms import by_standard_rules
from jflash.linear import linear_attention


def simple_gla(q: jax.Array, k: jax.Array, v: jax.Array, *, g=None, g_gamma=None, **options):
    """Linear attention with a scalar gate a head: `S_t = exp(g_t) S_(t-1) + k_t v_t^T`, `out_t = scale q_t S_t`.

    g: [B, S, H], a log decay for each token, or g_gamma: [H], one for all; at most one of them.
    Source: Yang et al., Gated Linear Attention (arXiv 2312.06635), the names of flash-linear-attention.
    """
    if g is not None and g_gamma is not None:
        raise ValueError("g with g_gamma must be one or the other: log decays of each token, or of each head")
    return linear_attention(q, k, v, log_decay=g_gamma if g is None else g, **options)


def retention(q: jax.Array, k: jax.Array, v: jax.Array, **options):
    """Linear attention in which head h forgets by `1 - 2^(-5 - h)` a token: `retention_log_decay`.

    Source: Sun et al., RetNet (arXiv 2307.08621), without its rotation, group norm and gate.
    """
    H = max(x.shape[-2] for x in (q, k, v))
    return linear_attention(q, k, v, log_decay=retention_log_decay(H), **options)


def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    layer_idx: int,
    num_layers: int,
    convention: str = "alibi",
    scale: float = 1.0,
    **options,
):
    """Linear attention of TransNormer and MiniMax: decay by head and layer, scale 1: see `lightning_log_decay`.

    Source: Qin et al., TransNormerLLM (arXiv 2307.14995) and Lightning Attention-2 (arXiv 2401.04658).
    """
    H = max(x.shape[-2] for x in (q, k, v))
    log_decay = lightning_log_decay(H, layer_idx, num_layers, convention)
    return linear_attention(q, k, v, log_decay=log_decay, scale=scale, **options)


@by_standard_rules
def mamba2_ssd(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    return_state: bool = False,
    **options,
):
    """The state-space layer of Mamba-2: `S_t = exp(dt_t A) S_(t-1) + dt_t B_t x_t^T`, `out_t = C_t S_t + D x_t`.

    Args:
        x: [batch, S, H, P]. B, C: [batch, S, G, N], H a multiple of G: head h reads group `h // (H / G)`.
        dt: [batch, S, H], the step sizes, >= 0 once dt_bias [H] is added and dt_softplus has been applied.
        A: [H], <= 0.
        D: [H] or [H, P], a skip connection. z: [batch, S, H, P], a gate: out is multiplied by silu(z).
        return_state, options: of `linear_attention`, but for log_decay, scale and normalize.

    Returns:
        out [batch, S, H, P], or (out, state) with state.kv [batch, H, N, P], the transpose of mamba_ssm's.

    Source: Dao and Gu, Mamba-2 (arXiv 2405.21060).
    """
    heads = x.shape[2:3]
    _check_shape("dt", dt, x.shape[:3])
    for name, of_heads in (("A", A), ("dt_bias", dt_bias)):
        _check_shape(name, of_heads, heads)
    _check_shape("D", D, heads, x.shape[2:])
    _check_shape("z", z, x.shape)
    step = dt.astype(jnp.promote_types(x.dtype, jnp.float32))
    if dt_bias is not None:
        step = step + dt_bias
    if dt_softplus:
        step = jax.nn.softplus(step)
    v = (x * step[..., None]).astype(x.dtype)
    results = linear_attention(C, B, v, log_decay=step * A, scale=1.0, return_state=return_state, **options)
    out, state = results if isinstance(results, tuple) else (results, None)
    wide = out.astype(step.dtype)
    if D is not None:
        wide = wide + (D if D.ndim == 2 else D[:, None]) * x
    if z is not None:
        wide = wide * jax.nn.silu(z.astype(step.dtype))
    out = wide.astype(x.dtype)
    return (out, state) if return_state else out


def _check_shape(name: str, x, *allowed: tuple[int, ...]) -> None:
    if x is not None and x.shape not in allowed:
        raise ValueError(f"{name}.shape={x.shape} must be {' or '.join(map(str, allowed))}, to go with x")


def retention_log_decay(H: int) -> jax.Array:
    """`log(1 - 2^(-5 - h))` for head h, float32 [H]."""
    return jnp.asarray([math.log1p(-(2.0 ** (-5 - h))) for h in range(H)], jnp.float32)


def lightning_log_decay(H: int, layer_idx: int, num_layers: int, convention: str = "alibi") -> jax.Array:
    """The log decay of each head of layer l of L, float32 [H].

    convention: "alibi", of the released TransNormer and MiniMax code: `-slope_h (1 - l / (L - 1) + 1e-5)` with
        `alibi_slopes`; "transnormer_paper", also of flash-linear-attention: `-(8 h / H) (1 - l / L)`.
    """
    if not 0 <= layer_idx < num_layers:
        raise ValueError(f"layer_idx={layer_idx} must be >= 0 and < num_layers={num_layers}")
    if convention == "alibi":
        return -alibi_slopes(H) * (1 - layer_idx / max(num_layers - 1, 1) + 1e-5)
    if convention == "transnormer_paper":
        return -jnp.arange(H, dtype=jnp.float32) * (8 / H * (1 - layer_idx / num_layers))
    raise ValueError(f"convention={convention!r} must be 'alibi' or 'transnormer_paper'")


def alibi_slopes(H: int) -> jax.Array:
    """`2^(-8 (h + 1) / H)`, float32 [H]; for other H than powers of two, those of the power below and every
    second one of the power above. (Press et al., arXiv 2108.12409)"""
    power = 2 ** int(math.log2(H))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * (H - power), 2)]
    return jnp.asarray(slopes, jnp.float32)

"""Softmax attention by cuDNN, which JAX brings along: for NVIDIA GPUs that jflash has no kernels for.

cuDNN counts causal and window from the first key and has no gradient through lse; calls that would notice go elsewhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jflash import xla
from pallas_kernels.problem import AttentionArrays, AttentionGradients, AttentionProblem

OLDEST, HOPPER = 80, 90  # compute capabilities: of its fused attention, and of that for head dims to 256


def why_not(p: AttentionProblem, direction: str) -> str | None:
    """Why cuDNN cannot take a problem in a direction, or None if it can."""
    capability = _capability(p.target)
    widest = 256 if capability >= HOPPER else 128
    masked = p.left is not None or p.right is not None
    reasons = (
        (capability < OLDEST, f"target={p.target} must be an NVIDIA GPU, sm_{OLDEST} or newer"),
        (p.dtype not in ("bfloat16", "float16"), f"dtype={p.dtype} must be bfloat16 or float16"),
        (p.D != p.Dv, f"head_dim={p.D} and value head_dim={p.Dv} must be equal"),
        (p.D > widest or p.D % 8 != 0, f"head_dim={p.D} must be <= {widest} and a multiple of 8"),
        (p.right not in (None, 0), f"window with right={p.right} must be 0, or both sides unbounded"),
        (p.left is not None and p.right is None, f"window with left={p.left} needs right=0"),
        (masked and p.offset != 0, f"causal or window with Sq={p.Sq} and Sk={p.Sk} must be equal lengths"),
        (p.deterministic and direction == "backward", "deterministic=True is not in cuDNN"),
        *((held, f"{name} is not in cuDNN") for name, held in _features(p).items()),
    )
    return next((reason for failed, reason in reasons if failed), None)


def forward(p: AttentionProblem, a: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, D] and lse [B, H, Sq]."""
    return _attend(p, a.q, a.k, a.v)


def backward(p: AttentionProblem, a: AttentionArrays, out, lse, d_out, d_lse) -> AttentionGradients:
    """Gradients of q, k and v; by the xla backend where lse has a cotangent, or where JAX would refuse odd lengths.

    Runs the forward again unless XLA sees that it ran in the same program.
    """
    if p.lse_gradient or p.Sq % 2 or p.Sk % 2:
        return xla.backward(p, a, out, lse, d_out, d_lse)
    _, pull = jax.vjp(lambda *qkv: _attend(p, *qkv), a.q, a.k, a.v)
    return AttentionGradients(*pull((d_out, jnp.zeros_like(d_lse))))


def _attend(p: AttentionProblem, q, k, v) -> tuple[jax.Array, jax.Array]:
    # What jax.nn calls. That rounds lse to the dtype of q, and this does not.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    mask = MaskType.NO_MASK if p.right is None else MaskType.CAUSAL
    window = None if p.left is None else p.left + 1  # how many keys a query sees
    options = {"scale": p.scale, "mask_type": mask, "sliding_window_length": window}
    attend: Any = dot_product_attention
    return attend(q, k, v, **options, return_residual=True)


def _features(p: AttentionProblem) -> dict[str, bool]:
    """What cuDNN lacks, or means in another way: a row that sees no key, the mask of dropout."""
    return {
        "softcap": p.softcap is not None,
        "bias": p.bias_shape is not None,
        "mask": p.mask_shape is not None,
        "segment_ids": p.segments,
        "packed sequences": p.key_ranges,
        "alibi_slopes": p.alibi,
        "sinks": p.sinks,
        f"dropout_rate={p.dropout_rate}": p.dropout_rate > 0,
    }


def _capability(target: str) -> int:
    """90 for "sm_90", 0 for what is no NVIDIA GPU."""
    number = target.removeprefix("sm_")
    return int(number) if number != target and number.isdigit() else 0

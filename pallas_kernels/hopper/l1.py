"""L1 attention on NVIDIA Hopper: what the kernels can take, and the calls around them."""

from __future__ import annotations

import jax

from pallas_kernels.hopper import TARGET
from pallas_kernels.problem import AttentionArrays, AttentionGradients, L1Problem


def why_not(p: L1Problem, direction: str) -> str | None:
    """Why these kernels cannot take a problem in a direction, or None if they can."""
    reasons = (
        (p.target != TARGET, f"target={p.target} must be {TARGET}, an NVIDIA Hopper GPU"),
        (p.dtype == "float64", f"dtype={p.dtype} must be float32, bfloat16 or float16"),
        (p.D > 128, f"head_dim={p.D} must be <= 128"),
        (p.Dv > 128, f"value head_dim={p.Dv} must be <= 128"),
        (p.scale <= 0, f"scale={p.scale} must be > 0"),
        (p.weight != "softmax", f"weight={p.weight!r} is not in the kernels"),
        (p.center, "center is not in the kernels"),
        (p.exclude_diagonal, "exclude_diagonal is not in the kernels"),
        (p.bias_shape is not None, "bias is not in the kernels"),
        (p.mask_shape is not None, "mask is not in the kernels"),
    )
    return next((reason for failed, reason in reasons if failed), None)


def forward(p: L1Problem, a: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] and lse [B, H, Sq]."""
    from pallas_kernels.hopper.l1_forward import l1_forward

    with jax.enable_x64(False):  # Mosaic GPU wants 32-bit indices, whatever the user wants
        return l1_forward(p, a)


def backward(p: L1Problem, a: AttentionArrays, out, lse, d_out, d_lse) -> AttentionGradients:
    """Gradients of q, k, v and sinks."""
    from pallas_kernels.hopper.l1_backward import l1_backward

    with jax.enable_x64(False):
        return l1_backward(p, a, out, lse, d_out, d_lse)

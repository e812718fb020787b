"""Linear attention on NVIDIA Hopper: what the kernels can take, and the calls around them."""

from __future__ import annotations

import jax

from pallas_kernels.hopper import TARGET
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem, LinearResults


def why_not(p: LinearProblem, direction: str) -> str | None:
    """Why these kernels cannot take a problem in a direction, or None if they can."""
    reasons = (
        (p.target != TARGET, f"target={p.target} must be {TARGET}, an NVIDIA Hopper GPU"),
        (p.dtype != "bfloat16", f"dtype={p.dtype} must be bfloat16: a state of many tokens leaves float16's range"),
        (max(p.D, p.Dv) > 256, f"head_dim={max(p.D, p.Dv)} must be <= 256"),
        (p.mask_shape is not None, "mask is not in the kernels"),
        (not p.causal, "causal=False is not in the kernels"),
        (p.normalize, "normalize is not in the kernels"),
        (p.sequences is not None, "cu_seqlens is not in the kernels"),
        (p.scale == 0, f"scale={p.scale} must not be 0"),
        (p.chunk_size not in (None, 64), f"chunk_size={p.chunk_size} must be 64"),
    )
    return next((reason for failed, reason in reasons if failed), None)


def forward(p: LinearProblem, a: LinearArrays) -> LinearResults:
    """out in the input dtype and the final state in float32."""
    from pallas_kernels.hopper.linear_gradients import linear_forward

    with jax.enable_x64(False):  # Mosaic GPU wants 32-bit indices, whatever the user wants
        return linear_forward(p, a)


def backward(p: LinearProblem, a: LinearArrays, out, norm, d_out, d_kv, d_z) -> LinearGradients:
    """Gradients of q, k, v, log_decay and kv."""
    from pallas_kernels.hopper.linear_gradients import linear_gradients

    with jax.enable_x64(False):
        return linear_gradients(p, a, d_out, d_kv)

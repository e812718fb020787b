"""Linear attention on NVIDIA Hopper: what the kernels can take, and the calls around them."""

from __future__ import annotations

import jax

from pallas_kernels.hopper import TARGET
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem, LinearResults
from pallas_kernels.tiles import padded


def why_not(p: LinearProblem, direction: str) -> str | None:
    """Why these kernels cannot take a problem in a direction, or None if they can."""
    return _why_not_masked(p) if p.mask_shape is not None else _why_not_causal(p)


def _why_not_masked(p: LinearProblem) -> str | None:
    assert p.mask_shape is not None
    lengths = p.mask_shape[2:]
    reasons = (
        (p.target != TARGET, f"target={p.target} must be {TARGET}, an NVIDIA Hopper GPU"),
        (p.dtype not in ("bfloat16", "float16"), f"dtype={p.dtype} must be bfloat16 or float16"),
        (max(p.D, p.Dv) > 128, f"head_dim={max(p.D, p.Dv)} with a mask must be <= 128"),
        (padded(p.D) != padded(p.Dv), f"head_dim={p.D} and value head_dim={p.Dv} must pad to one multiple of 64"),
        (lengths != (p.Sq, p.Sk), f"mask lengths {lengths} must be those of q and k, {(p.Sq, p.Sk)}, in the kernels"),
        (p.normalize, "normalize is not in the kernels"),
    )
    return next((reason for failed, reason in reasons if failed), None)


def _why_not_causal(p: LinearProblem) -> str | None:
    reasons = (
        (p.target != TARGET, f"target={p.target} must be {TARGET}, an NVIDIA Hopper GPU"),
        (p.dtype != "bfloat16", f"dtype={p.dtype} must be bfloat16: a state of many tokens leaves float16's range"),
        (max(p.D, p.Dv) > 256, f"head_dim={max(p.D, p.Dv)} must be <= 256"),
        (p.initial_state and p.sequences is not None, "initial_state with cu_seqlens is not in the kernels"),
        (p.final_state and p.sequences is not None, "return_state with cu_seqlens is not in the kernels"),
        (p.scale == 0, f"scale={p.scale} must not be 0"),
        (p.chunk_size not in (None, 64), f"chunk_size={p.chunk_size} must be 64"),
    )
    return next((reason for failed, reason in reasons if failed), None)


def forward(p: LinearProblem, a: LinearArrays) -> LinearResults:
    """out in the input dtype, norm and the final state in float32."""
    from pallas_kernels.hopper import linear_calls, linear_masked

    with jax.enable_x64(False):  # Mosaic GPU wants 32-bit indices, whatever the user wants
        if p.mask_shape is not None:
            return linear_masked.forward(p, a)
        return linear_calls.forward(p, a)


def backward(p: LinearProblem, a: LinearArrays, out, norm, d_out, d_kv, d_z) -> LinearGradients:
    """Gradients of q, k, v, log_decay, kv and z, or of the mask."""
    from pallas_kernels.hopper import linear_calls, linear_masked

    with jax.enable_x64(False):
        if p.mask_shape is not None:
            return linear_masked.backward(p, a, d_out)
        return linear_calls.backward(p, a, out, norm, d_out, d_kv, d_z)

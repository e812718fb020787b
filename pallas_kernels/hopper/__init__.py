"""Softmax attention on NVIDIA Hopper: what the kernels can take, and the calls around them.

The kernels themselves are imported when first used: importing Mosaic GPU takes a while.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.problem import AttentionArrays, AttentionGradients, AttentionProblem
from pallas_kernels.tiles import padded

TARGET = "sm_90"


def why_not(p: AttentionProblem, direction: str) -> str | None:
    """Why these kernels cannot take a problem in a direction, or None if they can."""
    reasons = (
        (p.target != TARGET, f"target={p.target} must be {TARGET}, an NVIDIA Hopper GPU"),
        (p.dtype not in ("bfloat16", "float16"), f"dtype={p.dtype} must be bfloat16 or float16"),
        (
            p.deterministic and direction == "backward" and _adds_to_bias_in_any_order(p),
            f"the gradient of a bias of shape {p.bias_shape} with deterministic=True must not be summed over B or H",
        ),
        (
            direction == "backward" and p.bias_gradient and p.softcap is not None and max(p.D, p.Dv) > 192,
            f"head_dim={max(p.D, p.Dv)} with softcap and the gradient of a bias must be <= 192",
        ),
        (p.scale <= 0, f"scale={p.scale} must be > 0"),
    )
    return next((reason for failed, reason in reasons if failed), None)


def _adds_to_bias_in_any_order(p: AttentionProblem) -> bool:
    """Whether several CTAs add to one number; a bias of one column has no part in the kernels' gradient."""
    shape = p.bias_shape
    return p.bias_gradient and shape is not None and shape[3] > 1 and shape[:2] != (p.B, p.H)


def forward(p: AttentionProblem, a: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] and lse [B, H, Sq]."""
    from pallas_kernels.hopper.attention_forward import attention_forward

    with jax.enable_x64(False):  # Mosaic GPU wants 32-bit indices, whatever the user wants
        if _has_kernel(p):
            return attention_forward(p, a)
        out, lse = attention_forward(*_of_one_head_dim(p, a))
        return out[..., : p.Dv], lse


def backward(p: AttentionProblem, a: AttentionArrays, out, lse, d_out, d_lse) -> AttentionGradients:
    """Gradients of q, k, v, bias and sinks."""
    from pallas_kernels.hopper.attention_gradients import attention_gradients

    with jax.enable_x64(False):
        if _has_kernel(p):
            return attention_gradients(p, a, out, lse, d_out, d_lse)
        out, d_out = _widened(out, p), _widened(d_out, p)
        found = attention_gradients(*_of_one_head_dim(p, a), out, lse, d_out, d_lse)
        return found._replace(q=found.q[..., : p.D], k=found.k[..., : p.D], v=found.v[..., : p.Dv])


def _has_kernel(p: AttentionProblem) -> bool:
    """Whether a kernel has both head dims."""
    return padded(p.D) == padded(p.Dv) or (padded(p.D) == 192 and p.Dv < 192)


def _of_one_head_dim(p: AttentionProblem, a: AttentionArrays) -> tuple[AttentionProblem, AttentionArrays]:
    """The same call with zeros behind the smaller head dim."""
    D = max(p.D, p.Dv)
    q, k, v = (_widened(x, p) for x in (a.q, a.k, a.v))
    return dataclasses.replace(p, D=D, Dv=D), a._replace(q=q, k=k, v=v)


def _widened(x: jax.Array, p: AttentionProblem) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, max(p.D, p.Dv) - x.shape[3])))

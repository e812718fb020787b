"""Softmax attention on a key/value cache on NVIDIA Hopper: what the decode kernel can take, and the call.

The kernel itself is imported when first used: importing Mosaic GPU takes a while.
"""

from __future__ import annotations

import jax

from pallas_kernels.hopper import TARGET
from pallas_kernels.problem import AttentionProblem, CacheArrays

BLOCK_KEYS = 64  # that are copied at once


def why_not(p: AttentionProblem, direction: str) -> str | None:
    """Why the kernel cannot take a problem, or None if it can. There is no backward to ask for."""
    fits = p.page is None or p.page % BLOCK_KEYS == 0 or (p.page % 8 == 0 and BLOCK_KEYS % p.page == 0)
    reasons = (
        (p.target != TARGET, f"target={p.target} must be {TARGET}, an NVIDIA Hopper GPU"),
        (p.dtype not in ("bfloat16", "float16"), f"dtype={p.dtype} must be bfloat16 or float16"),
        (p.D != p.Dv or p.D not in (64, 128), f"head_dim={p.D} and value head_dim={p.Dv} must both be 64 or 128"),
        (not fits, f"page={p.page} must be 8, 16, 32 or a multiple of {BLOCK_KEYS}"),
        (p.scale <= 0, f"scale={p.scale} must be > 0"),
    )
    return next((reason for failed, reason in reasons if failed), None)


def forward(p: AttentionProblem, a: CacheArrays) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] and lse [B, H, Sq]."""
    from pallas_kernels.hopper.decode import decode

    with jax.enable_x64(False):  # Mosaic GPU wants 32-bit indices, whatever the user wants
        return decode(p, a)

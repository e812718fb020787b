"""Attention kernels for JAX: fast on NVIDIA Hopper, blocked and O(N) in memory on any device."""

from jflash.attention import explain, flash_attention, why_not
from jflash.l1 import l1_attention, l1_attention_bidi, l1_attention_sparse, l1_scores
from jflash.linear import LinearAttentionState, linear_attention, linear_attention_step
from jflash.linear_variants import lightning_attention, mamba2_ssd, retention, simple_gla

__all__ = [
    "LinearAttentionState",
    "explain",
    "flash_attention",
    "l1_attention",
    "l1_attention_bidi",
    "l1_attention_sparse",
    "l1_scores",
    "lightning_attention",
    "linear_attention",
    "linear_attention_step",
    "mamba2_ssd",
    "retention",
    "simple_gla",
    "why_not",
]
__version__ = "0.1.0"

"""Attention kernels for JAX: fast on NVIDIA Hopper, blocked and O(N) in memory on any device."""

from jflash.attention import explain, flash_attention, why_not
from jflash.kv_cache import flash_attention_with_kvcache
from jflash.l1 import l1_attention, l1_attention_bidi, l1_attention_sparse, l1_scores
from jflash.linear import LinearAttentionState, linear_attention, linear_attention_step
from jflash.linear_variants import lightning_attention, mamba2_ssd, retention, simple_gla
from jflash.packed import (
    flash_attention_kvpacked,
    flash_attention_qkvpacked,
    flash_attention_varlen_kvpacked,
    flash_attention_varlen_qkvpacked,
)
from jflash.padding import pad_input, unpad_input, unpad_input_for_concatenated_sequences
from jflash.rotary import apply_rotary
from jflash.varlen import flash_attention_varlen

__all__ = [
    "LinearAttentionState",
    "apply_rotary",
    "explain",
    "flash_attention",
    "flash_attention_kvpacked",
    "flash_attention_qkvpacked",
    "flash_attention_varlen",
    "flash_attention_varlen_kvpacked",
    "flash_attention_varlen_qkvpacked",
    "flash_attention_with_kvcache",
    "l1_attention",
    "l1_attention_bidi",
    "l1_attention_sparse",
    "l1_scores",
    "lightning_attention",
    "linear_attention",
    "linear_attention_step",
    "mamba2_ssd",
    "pad_input",
    "retention",
    "simple_gla",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
    "why_not",
]
__version__ = "0.1.0"

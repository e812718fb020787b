"""jflash's attention kernels for PyTorch tensors, on CUDA and CPU, with autograd. Also `jflash.torch`.

The same JAX functions that `jflash` offers, on the memory of the tensors themselves. Importing this imports
torch but not JAX, which follows at the first call.
"""

from interop.as_flash_attn import install_as_flash_attn
from interop.bert_padding import pad_input, unpad_input, unpad_input_for_concatenated_sequences
from interop.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from interop.kv_cache import flash_attn_with_kvcache
from interop.l1 import l1_attention, l1_attention_bidi, l1_attention_sparse, l1_scores
from interop.l1_modules import L1Attn, L1AttnSparse, L1AttnSparseBidi, expandCoo
from interop.linear import (
    chunk_simple_gla,
    flash_linear_attention,
    fused_recurrent_simple_gla,
    linear_attention,
    normal_linear_attention,
)
from interop.linear_modules import NormLinearAttention, SRMSNorm, TransNormerBlock
from interop.modules import MHA, FlashAttention, FlashCrossAttention, FlashSelfAttention
from interop.rotary import RotaryEmbedding, apply_rotary_emb
from interop.sdpa import scaled_dot_product_attention
from interop.varlen import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

__all__ = [
    "MHA",
    "FlashAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "L1Attn",
    "L1AttnSparse",
    "L1AttnSparseBidi",
    "NormLinearAttention",
    "RotaryEmbedding",
    "SRMSNorm",
    "TransNormerBlock",
    "apply_rotary_emb",
    "chunk_simple_gla",
    "expandCoo",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flash_linear_attention",
    "fused_recurrent_simple_gla",
    "install_as_flash_attn",
    "l1_attention",
    "l1_attention_bidi",
    "l1_attention_sparse",
    "l1_scores",
    "linear_attention",
    "normal_linear_attention",
    "pad_input",
    "scaled_dot_product_attention",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]

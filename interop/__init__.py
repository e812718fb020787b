"""jflash's attention kernels for PyTorch tensors, on CUDA and CPU, with autograd. Also `jflash.torch`.

The same JAX functions that `jflash` offers, on the memory of the tensors themselves. Importing this imports
torch but not JAX, which follows at the first call.
"""

from interop.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from interop.kv_cache import flash_attn_with_kvcache
from interop.rotary import RotaryEmbedding, apply_rotary_emb
from interop.sdpa import scaled_dot_product_attention
from interop.varlen import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "scaled_dot_product_attention",
]

"""jflash's attention kernels for PyTorch tensors, on CUDA and CPU, with autograd. Also `jflash.torch`.

The same JAX functions that `jflash` offers, on the memory of the tensors themselves. Importing this imports
torch but not JAX, which follows at the first call.
"""

from interop.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from interop.sdpa import scaled_dot_product_attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "scaled_dot_product_attention",
]

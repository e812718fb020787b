"""Attention kernels for JAX: fast on NVIDIA Hopper, blocked and O(N) in memory on any device."""

from jflash.attention import explain, flash_attention, why_not

__all__ = ["explain", "flash_attention", "why_not"]
__version__ = "0.1.0"

"""Queries, keys and values in one array, with one gradient for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jflash._arguments import array
from jflash.attention import flash_attention
from jflash.varlen import flash_attention_varlen


def flash_attention_qkvpacked(qkv: jax.Array, **options) -> Any:
    """`flash_attention(q, k, v, **options)` of qkv [B, S, 3, H, D]."""
    return flash_attention(*_unpack("qkv", qkv, ("batch", "seq", 3, "heads", "dim")), **options)


def flash_attention_kvpacked(q: jax.Array, kv: jax.Array, **options) -> Any:
    """`flash_attention(q, k, v, **options)` of kv [B, Sk, 2, Hk, D]."""
    return flash_attention(q, *_unpack("kv", kv, ("batch", "seq", 2, "heads", "dim")), **options)


def flash_attention_varlen_qkvpacked(qkv: jax.Array, *, cu_seqlens, max_seqlen=None, **options) -> Any:
    """`flash_attention_varlen(q, k, v, ...)` of qkv [T, 3, H, D], whose queries and keys have the same lengths."""
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": max_seqlen}
    return flash_attention_varlen(*_unpack("qkv", qkv, ("tokens", 3, "heads", "dim")), **lengths, **options)


def flash_attention_varlen_kvpacked(q: jax.Array, kv: jax.Array, **options) -> Any:
    """`flash_attention_varlen(q, k, v, **options)` of kv [Tk, 2, Hk, D]."""
    return flash_attention_varlen(q, *_unpack("kv", kv, ("tokens", 2, "heads", "dim")), **options)


def _unpack(name: str, x, axes: tuple) -> tuple[jax.Array, ...]:
    """Along the third axis from the end."""
    x = array(name, x)
    if x.ndim != len(axes) or x.shape[-3] != axes[-3]:
        raise ValueError(f"{name}.shape={x.shape} must be [{', '.join(map(str, axes))}]")
    return tuple(jnp.unstack(x, axis=-3))

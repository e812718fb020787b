"""Attention modules with the constructors and parameters of flash_attn 2's, and of its version 1 `FlashAttention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from interop.bert_padding import pad_input, unpad_input
from interop.flash_attn import flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from interop.kv_cache import flash_attn_with_kvcache
from interop.rotary import RotaryEmbedding
from interop.varlen import flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func


def get_alibi_slopes(nheads: int) -> list[float]:
    """Slopes 2^(-8 h / n) for h = 1 ... n; for a number of heads that is no power of two, every other one of 2n too.

    Source: Press et al., ALiBi (arXiv 2108.12409).
    """
    power = 2 ** math.floor(math.log2(nheads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + (get_alibi_slopes(2 * power)[0::2][: nheads - power] if power < nheads else [])


class FlashAttention(nn.Module):
    """Self-attention of qkv [B, S, 3, H, D] with key padding: out [B, S, H, D], 0 at padding. Dropout in training."""

    def __init__(self, softmax_scale: float | None = None, attention_dropout: float = 0.0, causal: bool = False):
        super().__init__()
        self.softmax_scale, self.attention_dropout, self.causal = softmax_scale, attention_dropout, causal

    def forward(self, qkv: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """key_padding_mask: bool [B, S], True for a token."""
        options = (self.attention_dropout if self.training else 0.0, self.softmax_scale, self.causal)
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, *options)
        batch, seqlen = qkv.shape[:2]
        packed, indices, cu_seqlens, longest, _ = unpad_input(qkv, key_padding_mask)
        return pad_input(
            flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, longest, *options), indices, batch, seqlen
        )


class _Inner(nn.Module):
    """What `FlashSelfAttention` and `FlashCrossAttention` share."""

    def __init__(self, causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic):
        super().__init__()
        self.causal, self.softmax_scale, self.window_size = causal, softmax_scale, window_size
        self.attention_dropout, self.deterministic = attention_dropout, deterministic
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def options(self, causal: bool | None) -> dict[str, Any]:
        """Of a call."""
        return {
            "dropout_p": self.attention_dropout if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": None if self.alibi_slopes is None else self.alibi_slopes.float(),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Inner):
    """Attention of qkv [B, S, 3, H, D], or [T, 3, H, D] with cu_seqlens. Dropout in training."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ):
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """out of q's shape."""
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self.options(causal))
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **self.options(causal))


class FlashCrossAttention(_Inner):
    """Attention of q [B, Sq, H, D] to kv [B, Sk, 2, Hk, D], or packed with cu_seqlens and cu_seqlens_k."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ):
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """out of q's shape."""
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **self.options(causal))
        if cu_seqlens_k is None:
            raise ValueError("cu_seqlens needs cu_seqlens_k, where the sequences of kv start")
        lengths = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(q, kv, *lengths, **self.options(causal))


class MHA(nn.Module):
    """Multi-head attention with its projections, rotary embedding or ALiBi, and a cache for generation.

    Parameters are Wqkv, or Wq and Wkv with cross_attn, and out_proj, as in flash_attn. Projections are plain
    `nn.Linear`s. In Wqkv's output come the H query heads, then Hk key heads, then Hk value heads.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.num_heads, self.num_heads_kv = num_heads, num_heads if num_heads_kv is None else num_heads_kv
        if embed_dim % num_heads or num_heads % self.num_heads_kv:
            heads = f"num_heads={num_heads} must divide embed_dim={embed_dim}"
            raise ValueError(f"{heads} and be a multiple of num_heads_kv={self.num_heads_kv}")
        if cross_attn and rotary_emb_dim:
            raise ValueError(f"rotary_emb_dim={rotary_emb_dim} must be 0 with cross_attn: its keys are no neighbours")
        self.head_dim, self.causal, self.layer_idx, self.cross_attn = (
            embed_dim // num_heads,
            causal,
            layer_idx,
            cross_attn,
        )
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        self.inner_attn = FlashCrossAttention(causal, softmax_scale, dropout, slopes, window_size)
        self.rotary_emb = (
            RotaryEmbedding(rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved) if rotary_emb_dim else None
        )
        where, kv_dim = {"device": device, "dtype": dtype}, 2 * self.head_dim * self.num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, qkv_proj_bias, **where)
            self.Wkv = nn.Linear(embed_dim, kv_dim, qkv_proj_bias, **where)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, qkv_proj_bias, **where)
        self.out_proj = nn.Linear(embed_dim, embed_dim, out_proj_bias, **where)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None) -> tuple[Tensor, Tensor]:
        """Empty k_cache and v_cache [B, max_seqlen, Hk, D]."""
        like = self.out_proj.weight
        shape = (batch_size, max_seqlen, self.num_heads_kv, self.head_dim)
        return like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        cache_seqlens: int | Tensor = 0,
    ) -> Tensor:
        """out of x's shape.

        Args:
            x: [B, S, embed_dim], or [T, embed_dim] with cu_seqlens [N + 1] and without a cache.
            x_kv: [B, Sk, embed_dim], what cross-attention attends to.
            key_padding_mask: bool [B, S], True for a token; out is 0 at padding before its projection.
            cache: (k_cache, v_cache) of `allocate_inference_cache`, written at cache_seqlens and up.
        """
        if sum(given is not None for given in (key_padding_mask, cu_seqlens, cache)) > 1:
            raise ValueError("only one of key_padding_mask, cu_seqlens and cache may be given")
        if self.cross_attn != (x_kv is not None):
            raise ValueError("x_kv must be given with cross_attn=True, and only then")
        if cu_seqlens is not None and (self.rotary_emb is not None or self.cross_attn):
            raise NotImplementedError("cu_seqlens with rotary_emb_dim or cross_attn: pad the batch")
        if self.cross_attn and (cache is not None or key_padding_mask is not None):
            raise NotImplementedError("cross_attn with a cache or key_padding_mask")
        q, kv = self._project(x, x_kv)
        if cache is not None:
            out = self._cached(q, kv, cache, cache_seqlens)
        else:
            q, kv = self._turned(q, kv)
            out = self._attend(q, kv, key_padding_mask, cu_seqlens, max_seqlen)
        return self.out_proj(out.flatten(-2))

    def _project(self, x: Tensor, x_kv: Tensor | None) -> tuple[Tensor, Tensor]:
        """q [..., H, D] and kv [..., 2, Hk, D]."""
        if x_kv is None:
            width = self.num_heads * self.head_dim
            q, kv = self.Wqkv(x).split([width, 2 * self.num_heads_kv * self.head_dim], dim=-1)
        else:
            q, kv = self.Wq(x), self.Wkv(x_kv)
        return q.unflatten(-1, (-1, self.head_dim)), kv.unflatten(-1, (2, -1, self.head_dim))

    def _turned(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        if self.rotary_emb is None:
            return q, kv
        k, v = kv.unbind(-3)
        q, k = self.rotary_emb.turn(q), self.rotary_emb.turn(k)
        return q, torch.stack([k, v], dim=-3)

    def _attend(self, q, kv, key_padding_mask, cu_seqlens, max_seqlen) -> Tensor:
        if key_padding_mask is None:
            return self.inner_attn(q, kv, None, cu_seqlens, max_seqlen, cu_seqlens, max_seqlen)
        batch, seqlen = q.shape[:2]
        packed_q, indices, cu_seqlens, longest, _ = unpad_input(q, key_padding_mask)
        packed_kv = kv.flatten(0, 1)[indices]
        out = self.inner_attn(packed_q, packed_kv, None, cu_seqlens, longest, cu_seqlens, longest)
        return pad_input(out, indices, batch, seqlen)

    def _cached(self, q: Tensor, kv: Tensor, cache: tuple[Tensor, Tensor], cache_seqlens: int | Tensor) -> Tensor:
        rotary = {}
        if self.rotary_emb is not None:
            cos, sin = self.rotary_emb.tables(cache[0].shape[1], q)
            rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": self.rotary_emb.interleaved}
        options = self.inner_attn.options(None)
        del options["dropout_p"], options["deterministic"]
        k, v = kv.unbind(-3)
        return flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=cache_seqlens, **rotary, **options)

"""The functions of flash_attn 2 for packed sequences, under its names and in its argument order."""

from __future__ import annotations

import torch
from torch import Tensor

from interop import _arguments, key_ranges
from interop.attention import attention
from interop.flash_attn import Attention


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Attention:
    """`flash_attn_func` of each of N packed sequences with itself, whatever their lengths, 0 included.

    Sequence n is the queries `cu_seqlens_q[n]` to `cu_seqlens_q[n + 1]` and the keys likewise; its queries stand
    at the end of its keys. What no sequence can see is skipped, forward and backward.

    Args:
        q: [Tq, H, D], all sequences one after another; k: [Tk, Hk, D]; v: [Tk, Hk, Dv]. Queries behind the last
            sequence give 0; NaN there, or in k and v, may reach the last sequence.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [N + 1], rising from 0. Their values are checked on CPU only.
        max_seqlen_q, max_seqlen_k: integers, or tensors of one; checked on CPU, and not needed.
        alibi_slopes: float32 [H] or [N, H].
        block_table: integers [N, n]: k and v are pages, [pages, page, Hk, D] and [pages, page, Hk, Dv], and page j of
            sequence m is row `block_table[m, j]`. The pages in use are gathered first: give max_seqlen_k, or all
            that the table names are. Values are checked on CPU only.
        The rest as for `flash_attn_func`.

    Returns:
        out [Tq, H, Dv] in q's dtype, or (out, lse, None) with lse [H, Tq].

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names both.
        NotImplementedError: as for `flash_attn_func`.

    Source: the interface of flash_attn 2; Dao, FlashAttention-2 (arXiv 2307.08691).
    """
    if block_table is not None:
        k, v = _from_pages(k, v, block_table, cu_seqlens_k, max_seqlen_k)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _arguments.check_axes(name, x, "[tokens, heads, dim]")
    cu_seqlens_q = _arguments.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q)
    cu_seqlens_k = _arguments.cu_seqlens("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        shapes = f"{list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k shapes {shapes} must be equal: one sequence for each")
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() == 2:
        alibi_slopes = _slopes_of_tokens(alibi_slopes, cu_seqlens_q, q)
    options = _arguments.options(softmax_scale, causal, window_size, softcap, dropout_p, deterministic)
    ranges = key_ranges.packed(cu_seqlens_q, cu_seqlens_k, q.shape[0], options.left, options.right)
    options = options._replace(left=-1, right=-1)
    out, lse = attention(q[None], k[None], v[None], options, alibi_slopes=alibi_slopes, key_ranges=ranges)
    return (out[0], lse[0], None) if return_attn_probs else out[0]


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """`flash_attn_varlen_func` with k = kv[:, 0] and v = kv[:, 1] of kv [Tk, 2, Hk, D]. kv has one gradient."""
    k, v = _arguments.unpack("kv", kv, "tokens", 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """`flash_attn_varlen_func` of the three slices of qkv [T, 3, H, D]. qkv has one gradient."""
    q, k, v = _arguments.unpack("qkv", qkv, "tokens", 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _from_pages(
    k: Tensor, v: Tensor, table: Tensor, cu_seqlens: Tensor, longest: int | Tensor | None
) -> tuple[Tensor, ...]:
    """k and v packed, of the pages that a table [N, n] names, and zeros behind the last sequence."""
    for name, x in (("k", k), ("v", v)):
        _arguments.check_axes(name, x, "[pages, page, heads, dim]")
    (pages, page), N = k.shape[:2], cu_seqlens.shape[0] - 1
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"k.shape={list(k.shape)} and v.shape={list(v.shape)} must agree in pages and page")
    _arguments.check_integers("block_table", table)
    if table.dim() != 2 or table.shape[0] != N or 0 in table.shape:
        raise ValueError(f"block_table.shape={list(table.shape)} must be [N, pages] with N={N} and pages > 0")
    room = table.shape[1] * page
    if _arguments.values_are_known(cu_seqlens) and _arguments.values_are_known(table):
        lengths = cu_seqlens.diff()
        if lengths.max() > room:
            raise ValueError(
                f"cu_seqlens_k={cu_seqlens.tolist()} has {int(lengths.max())} keys, the table room for {room}"
            )
        used = table[torch.arange(table.shape[1]) * page < lengths[:, None]]
        if used.numel() and (used.min() < 0 or used.max() >= pages):
            raise ValueError(f"rows {used.tolist()} of block_table must be in [0, {pages})")
    tokens = N * (room if longest is None else min(room, int(longest)))
    token = torch.arange(tokens, device=k.device, dtype=cu_seqlens.dtype)
    sequence = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp(0, N - 1)
    place = (token - cu_seqlens[sequence]).clamp(0, room - 1)
    rows = table[sequence, place // page].clamp(0, pages - 1)
    there = (token < cu_seqlens[-1])[:, None, None]
    return tuple(torch.where(there, x[rows, place % page], 0) for x in (k, v))


def _slopes_of_tokens(slopes: Tensor, cu_seqlens: Tensor, q: Tensor) -> Tensor:
    """[N, H] -> [1, H, Tq]."""
    N, (T, H, _) = cu_seqlens.shape[0] - 1, q.shape
    if list(slopes.shape) != [N, H]:
        raise ValueError(f"alibi_slopes.shape={list(slopes.shape)} must be [H]={[H]} or [N, H]={[N, H]}")
    token = torch.arange(T, device=q.device, dtype=cu_seqlens.dtype)
    sequence = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp(max=max(N - 1, 0))
    return slopes[sequence].T[None].contiguous()

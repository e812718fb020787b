"""`flash_attn_with_kvcache` of flash_attn 2: the cache is written in place by torch, and read in place by JAX."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from interop import _arguments
from interop.cache_ops import attention_with_cache
from interop.rotary import rotate


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | Any:
    """Writes k and v into the caches behind what is there, then `out = softmax(softcap(scale q k^T) + alibi) v` on all.

    Queries stand at the end of the keys: query i of an entry with n keys, new ones included, is at key position
    `i + n - Sq`. What lies behind the keys is never read. Without a gradient.

    Args:
        q: [B, Sq, H, D].
        k_cache, v_cache: [B, Sc, Hk, D] and [B, Sc, Hk, Dv]; with cache_batch_idx [N, Sc, ...]; with block_table
            [N, page, ...], for a page of any size. Written in place; copied at each call unless contiguous.
        k, v: [B, Sn, Hk, D] and [B, Sn, Hk, Dv], written at positions cache_seqlens and up.
        rotary_cos, rotary_sin: [positions, R / 2]; turns the first R features of new key n at position
            cache_seqlens + n, and of query i at cache_seqlens + i if causal or windowed, else at cache_seqlens.
        cache_seqlens: an integer or integers [B], the keys in the cache before the new ones. Default: all of it.
        cache_batch_idx: integers [B], the row of the cache of each entry.
        cache_leftpad: integers [B]: keys before are padding.
        block_table: integers [B, n]: page j of entry b is row `block_table[b, j]`.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as for `flash_attn_func`.
        rotary_interleaved: pairs are (0, 1), (2, 3) ..., rather than (0, R/2), (1, R/2 + 1) ...
        num_splits: a hint for GPU kernels; 0 leaves it to them.
        return_softmax_lse: return (out, lse).

    Returns:
        out [B, Sq, H, Dv], or (out, lse) with lse [B, H, Sq].

    Raises:
        ValueError, TypeError: an argument breaks a rule above, the cache is too short, or a row, page or position
            is out of range; the caches are as they were. Values on a GPU are not waited for: there an entry
            that breaks a rule writes nothing, and its out is NaN.
        NotImplementedError: q, k, v or a cache requires a gradient.

    Source: the interface of flash_attn 2.
    """
    new = _check(q, k_cache, v_cache, k, v, cache_seqlens, num_splits)
    pages = _pages(q, k_cache, cache_batch_idx, block_table)
    fits = k_cache.shape[1] * (1 if pages is None else pages.shape[1])
    start = _integers("cache_seqlens", fits if cache_seqlens is None else cache_seqlens, q)
    leftpad = None if cache_leftpad is None else _integers("cache_leftpad", cache_leftpad, q)
    left, right = _arguments.window(window_size)
    in_order = causal or left >= 0 or right >= 0
    reach = new if rotary_cos is None else max(new, q.shape[1] if in_order else 1)
    _check_values(k_cache, start, pages, fits, new, None if rotary_cos is None else rotary_cos.shape[0] - reach)
    ok = (start >= 0) & (start + new <= fits)
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None and rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos and rotary_sin need k and v: the keys in the cache have been turned already")
        ok &= start + reach <= rotary_cos.shape[0]
        at = (start[:, None] + torch.arange(reach, device=q.device)).clamp(0, rotary_cos.shape[0] - 1)
        q = rotate(q, rotary_cos, rotary_sin, at[:, : q.shape[1]] if in_order else at[:, :1], rotary_interleaved)
        k = rotate(k, rotary_cos, rotary_sin, at[:, :new], rotary_interleaved)
    if k is not None and v is not None:
        rows, slots, ok = _places(k_cache, start, pages, fits, new, ok)
        for cache, x in ((k_cache, k), (v_cache, v)):
            cache[rows, slots] = torch.where(ok[:, None, None, None], x, cache[rows, slots])
    out, lse = attention_with_cache(
        q, k_cache, v_cache, torch.where(ok, start + new, -1), leftpad, pages,
        None if alibi_slopes is None else _arguments.slopes(alibi_slopes, q),
        None if softmax_scale is None else _arguments.number("softmax_scale", softmax_scale),
        left, 0 if causal else right, _arguments.softcap(softcap),
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def _places(cache: Tensor, start: Tensor, pages: Tensor | None, fits: int, new: int, ok: Tensor):
    """Row and slot [B, new] of each new token, in its own entry also where not ok; and ok with the rows checked."""
    at = (start[:, None] + torch.arange(new, device=start.device)).clamp(0, max(fits - 1, 0))
    if pages is None:
        return torch.arange(start.shape[0], device=start.device)[:, None].expand_as(at), at, ok
    N, page = cache.shape[:2]
    rows = pages.gather(1, at // page)
    ok = ok & ((rows >= 0) & (rows < N)).all(dim=1)
    return rows.clamp(0, N - 1), at % page, ok


def _check(q, k_cache, v_cache, k, v, cache_seqlens, num_splits) -> int:
    """Shapes, dtypes and devices; returns how many new keys each entry gets."""
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _arguments.check_axes(name, x, "[batch or pages, seq, heads, dim]")
    if k_cache.shape[0] != v_cache.shape[0]:
        raise ValueError(f"k_cache.shape={list(k_cache.shape)} and v_cache.shape={list(v_cache.shape)} must agree")
    _arguments.check_qkv(q[:0], k_cache[:0], v_cache[:0])
    if isinstance(num_splits, bool) or not isinstance(num_splits, numbers.Integral) or num_splits < 0:
        raise ValueError(f"num_splits={num_splits!r} must be an integer >= 0")
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    inputs = [x for x in (q, k, v, k_cache, v_cache) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise NotImplementedError("flash_attn_with_kvcache has no gradient: call it under torch.no_grad()")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError("flash_attn_with_kvcache has no forward-mode derivative: detach its inputs")
    if k is None:
        return 0
    if cache_seqlens is None:
        raise ValueError("k and v need cache_seqlens, the position to write them at")
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        _arguments.check_axes(name, x, "[batch, seq, heads, dim]")
        if (x.shape[0], x.shape[1], *x.shape[2:]) != (q.shape[0], k.shape[1], *cache.shape[2:]):
            expected = ["B", "Sn", *cache.shape[2:]]
            raise ValueError(f"{name}.shape={list(x.shape)} must be [{', '.join(map(str, expected))}], B={q.shape[0]}")
        if x.dtype != cache.dtype or x.device != cache.device:
            raise TypeError(f"{name} is {x.dtype} on {x.device}, must be the cache's {cache.dtype} on {cache.device}")
    return k.shape[1]


def _pages(q: Tensor, k_cache: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None) -> Tensor | None:
    """Rows of the cache for each entry, int64 [B, n], or None where entry b has row b."""
    B = q.shape[0]
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("block_table and cache_batch_idx must not both be given: a table names the rows itself")
    if block_table is not None:
        if block_table.dim() != 2 or block_table.shape[0] != B:
            raise ValueError(f"block_table.shape={list(block_table.shape)} must be [B, pages] with B={B}")
        return _whole("block_table", block_table, q)
    if cache_batch_idx is not None:
        return _integers("cache_batch_idx", cache_batch_idx, q)[:, None]
    if k_cache.shape[0] != B:
        sizes = f"{B} and {k_cache.shape[0]}"
        raise ValueError(f"batch sizes of q and k_cache, {sizes}, must be equal without cache_batch_idx")
    return None


def _integers(name: str, x: int | Tensor, q: Tensor) -> Tensor:
    """An integer or integers [B] -> int64 [B]."""
    B = q.shape[0]
    if not isinstance(x, Tensor):
        if isinstance(x, bool) or not isinstance(x, numbers.Integral):
            raise TypeError(f"{name}={x!r} must be an integer or a tensor")
        return torch.full((B,), int(x), device=q.device)
    if list(x.shape) not in ([], [1], [B]):
        raise ValueError(f"{name}.shape={list(x.shape)} must be [B]={[B]}")
    return _whole(name, x, q).expand(B)


def _whole(name: str, x: Tensor, q: Tensor) -> Tensor:
    _arguments.check_integers(name, x)
    if x.device != q.device:
        raise ValueError(f"{name}.device={x.device} must be {q.device}, as of the queries")
    return x.long()


def _check_values(cache: Tensor, start: Tensor, pages: Tensor | None, fits: int, new: int, last: int | None) -> None:
    """Raises where values on CPU say that the room, the rows or the rotary positions (to `last`) do not suffice."""
    if not _arguments.values_are_known(start) or not start.numel():
        return
    if start.min() < 0 or start.max() + new > fits:
        what = f"cache_seqlens={start.tolist()} and {new} new keys"
        raise ValueError(f"{what} must be >= 0, and in sum <= {fits}, the room in the cache")
    if last is not None and start.max() > last:
        raise ValueError(f"rotary_cos has no position for cache_seqlens={start.tolist()}, which must be <= {last}")
    if pages is None:
        return
    N, page = cache.shape[:2]
    first = page * torch.arange(pages.shape[1])
    used = pages[first < (start + new)[:, None]]
    if used.numel() and (used.min() < 0 or used.max() >= N):
        raise ValueError(f"rows {used.tolist()} of block_table or cache_batch_idx must be in [0, {N})")
    written = pages[(first < (start + new)[:, None]) & (first + page > start[:, None])] if new else used[:0]
    if written.unique().numel() < written.numel():
        raise ValueError(f"rows {written.tolist()} of the cache, which get new keys, must be different")

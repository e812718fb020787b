"""The functions of flash_attn 2, under its names and in its argument order.

Source: Dao, FlashAttention-2 (arXiv 2307.08691); the signatures are those of flash_attn 2.6 to 2.8.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from interop import _arguments
from interop.attention import attention

Attention = Tensor | Any  # (out, lse, None) with return_attn_probs; Any spares other callers a cast


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """Softmax attention in O(N) memory: `out = dropout(softmax(softcap(softmax_scale q k^T) + alibi)) v`.

    Queries stand at the end of the keys: query i is at key position `i + Sk - Sq`. A query that sees no key
    gives 0 and no gradient.

    Args:
        q: [B, Sq, H, D] in float16, bfloat16, float32 or float64, on CUDA or CPU. D <= 256.
        k: [B, Sk, Hk, D], same dtype. H is a multiple of Hk; query head h reads head `h // (H / Hk)`.
        v: [B, Sk, Hk, Dv], same dtype. Dv <= 256, and may differ from D.
        dropout_p: probability of dropping a weight, in [0, 1); what is kept is scaled by 1 / (1 - dropout_p).
            The seed is drawn from torch's default generator of the device, so `torch.manual_seed` repeats it.
        softmax_scale: multiplies `q k^T`. Default D**-0.5.
        causal: keys after the query's position are hidden. Combines with the window's left side.
        window_size: (left, right): keys from `left` before to `right` after the query's position are seen,
            both ends included. -1 on a side leaves it open.
        softcap: scores become `softcap * tanh(scores / softcap)`, before ALiBi and masks; 0 is off.
        alibi_slopes: float32 [H] or [B, H]; adds `-slope * |i + Sk - Sq - j|`. Has no gradient.
        deterministic: the backward gives the same bits every run. `torch.use_deterministic_algorithms` too.
        return_attn_probs: return (out, lse, None).

    Returns:
        out [B, Sq, H, Dv] in q's dtype, or (out, lse, None): lse [B, H, Sq] is the natural log of the softmax
        denominator before dropout, in float32 (float64 for float64), differentiable, and -inf for a query
        that sees no key (flash_attn: +inf). flash_attn's third value, a debugging aid of internal layout, is
        always None.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names both.
        NotImplementedError: a gradient of alibi_slopes, a second derivative or forward-mode derivative.
        RuntimeError: JAX has no backend for the tensors' device, or a CUDA graph is being captured.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691).
    """
    options = _arguments.options(softmax_scale, causal, window_size, softcap, dropout_p, deterministic)
    out, lse = attention(q, k, v, options, alibi_slopes=alibi_slopes, with_lse=return_attn_probs)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """`flash_attn_func(q, k, v, ...)` with k = kv[:, :, 0] and v = kv[:, :, 1] of kv [B, Sk, 2, Hk, D].

    The gradient of kv is one packed tensor. Other arguments, results and errors as there.
    """
    k, v = _arguments.unpack("kv", kv, "batch, seq", 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """`flash_attn_func(q, k, v, ...)` of the three slices of qkv [B, S, 3, H, D] along its third axis.

    The gradient of qkv is one packed tensor. Other arguments, results and errors as there.
    """
    q, k, v = _arguments.unpack("qkv", qkv, "batch, seq", 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip

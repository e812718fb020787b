"""`torch.nn.functional.scaled_dot_product_attention`, same signature and meaning, on these kernels."""

from __future__ import annotations

import math

from torch import Tensor

from interop import _arguments
from interop.attention import attention
from interop.operands import Options


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Softmax attention in O(N) memory: `out = dropout(softmax(scale query key^T + attn_mask)) value`.

    Args:
        query: [B, H, L, E] in float16, bfloat16, float32 or float64, on CUDA or CPU. E <= 256. In place of B
            there may be none or several axes, the same in query, key, value and, broadcasting, attn_mask; in
            place of B and H none.
        key: [B, Hk, S, E], same dtype. Hk = H, or a divisor of it with enable_gqa.
        value: [B, Hk, S, Ev], same dtype. Ev <= 256.
        attn_mask: broadcasts to [B, H, L, S]: bool, True = visible, or float32 or query's dtype, added to the
            scores and differentiable.
        dropout_p: as for `interop.flash_attn_func`; applies in training and evaluation alike, as in torch.
        is_causal: query i sees keys 0..i, counted from the top left as in torch. Not with attn_mask.
        scale: default E**-0.5.
        enable_gqa: query head h reads key/value head `h // (H / Hk)`.

    Returns:
        [B, H, L, Ev] in query's dtype, a transposed view of [B, L, H, Ev]. A query that sees no key gives 0.

    Raises: as `interop.flash_attn_func`. The kernels want [B, L, H, E] in memory: a query, key or value that
    is a transpose of that is used as it is, any other is copied.

    Source: torch.nn.functional.scaled_dot_product_attention.
    """
    if isinstance(query, Tensor) and query.dim() in (2, 3, 5, 6):
        return _of_other_axes(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    for name, x in (("query", query), ("key", key), ("value", value)):
        _arguments.check_axes(name, x, "[batch, heads, seq, dim]")
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"lengths of key and value, {key.shape[2]} and {value.shape[2]}, must be equal")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask with is_causal=True must be None: put the causal part into the mask")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"query heads={query.shape[1]} and key heads={key.shape[1]} must be equal without enable_gqa")
    right = -1
    if is_causal:
        key, value, right = causal_from_top_left(query.shape[2], key, value)
    options = Options(
        scale=None if scale is None else _arguments.number("scale", scale),
        right=right,
        dropout_p=_arguments.dropout_p(dropout_p),
    )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, _ = attention(q, k, v, options, attn_mask=attn_mask)
    return out.transpose(1, 2)


def _of_other_axes(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *options) -> Tensor:
    """`scaled_dot_product_attention` with the axes before the heads, none or several, as one."""
    lead = query.shape[:-3]
    for name, x in (("key", key), ("value", value)):
        if x.dim() != query.dim() or x.shape[:-3] != lead:
            raise ValueError(f"{name}.shape={list(x.shape)} must begin as query.shape={list(query.shape)} does")
    q, k, v = (x.reshape(math.prod(lead), math.prod(x.shape[-3:-2]), *x.shape[-2:]) for x in (query, key, value))
    if attn_mask is not None and attn_mask.dim() > 3:
        attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
    out = scaled_dot_product_attention(q, k, v, attn_mask, *options)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def causal_from_top_left(L: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """key and value without what none of L queries sees, and `right` of the operators.

    Query i sees keys 0..i, while the operators count from the bottom right.
    """
    key, value = key[:, :, :L], value[:, :, :L]
    return key, value, L - key.shape[2]

"""torch's own `scaled_dot_product_attention` on these kernels, wherever torch would choose its flash backend.

    interop.sdpa_backend.register()
    torch.nn.attention.activate_flash_attention_impl("JFLASH")

Models then need no change. torch decides as ever which calls are for flash; `restore_flash_attention_impl()`
gives them back. Source: torch.nn.attention's registry of flash implementations, torch >= 2.11.
"""

from __future__ import annotations

import torch
import torch.nn.attention
from torch import Tensor

from interop.attention import draw_seed
from interop.operands import Operands, Options
from interop.ops import attention_backward, attention_forward
from interop.sdpa import causal_from_top_left

NAME = "JFLASH"


def register() -> str:
    """Makes "JFLASH" known to `torch.nn.attention.activate_flash_attention_impl`, without activating it.

    Returns the name.

    Raises:
        RuntimeError: this torch has no such registry.
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise RuntimeError(f"torch=={torch.__version__} must be >= 2.11 for a registry of flash backends")
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_Handle)
    return NAME


class _Handle:
    """Holds the overrides of torch's operators; they end with it."""

    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL")
        for name, function, key in (
            ("_scaled_dot_product_flash_attention_for_cpu", _forward_cpu, "CPU"),
            ("_scaled_dot_product_flash_attention_for_cpu_backward", _backward_cpu, "CPU"),
            ("_scaled_dot_product_flash_attention", _forward_cuda, "CUDA"),
            ("_scaled_dot_product_flash_attention_backward", _backward_cuda, "CUDA"),
        ):
            self.library.impl(name, function, key)

    def remove(self) -> None:
        self.library = None


def _forward_cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    x, options = _call(query, key, value, dropout_p, is_causal, attn_mask, scale, None)
    out, lse = attention_forward(*x, *options)
    return _like(query, out.transpose(1, 2)), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _backward_cpu(d_out, query, key, value, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    x, options = _call(query, key, value, dropout_p, is_causal, attn_mask, scale, None)
    return _gradients(d_out, key, out, lse, x, options)


def _forward_cuda(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask=True must be False: the weights are never in memory")
    seed = draw_seed(query.device) if dropout_p else torch.zeros((1, 2), dtype=torch.int32, device=query.device)
    x, options = _call(query, key, value, dropout_p, is_causal, None, scale, seed if dropout_p else None)
    out, lse = attention_forward(*x, *options)
    rng_state = seed[0].to(torch.int64).view(torch.uint64)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    lengths = query.shape[2], key.shape[2]
    return _like(query, out.transpose(1, 2)), lse, None, None, *lengths, rng_state, unused, query.new_empty(0)


def _backward_cuda(d_out, query, key, value, out, lse, *rest, scale=None):
    *_lengths, dropout_p, is_causal, rng_state, _unused = rest
    seed = rng_state.view(torch.int64).to(torch.int32)[None] if dropout_p else None
    x, options = _call(query, key, value, dropout_p, is_causal, None, scale, seed)
    found = _gradients(d_out, key, out, lse, x, options)
    return tuple(map(_like, (query, key, value), found))


def _call(query, key, value, dropout_p, is_causal, attn_mask, scale, seed) -> tuple[Operands, Options]:
    """The operators' arguments for torch's."""
    right = -1
    if is_causal:
        key, value, right = causal_from_top_left(query.shape[2], key, value)
    bias = mask = None
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        bias, mask = (None, attn_mask) if attn_mask.dtype == torch.bool else (attn_mask, None)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    deterministic = torch.are_deterministic_algorithms_enabled()
    options = Options(scale=scale, right=right, dropout_p=dropout_p, deterministic=deterministic)
    return Operands(q, k, v, bias=bias, mask=mask, dropout_seed=seed), options


def _gradients(d_out, key, out, lse, x: Operands, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value: transposes of [B, S, H, D], with zeros for keys that no query saw."""
    rows = d_out.transpose(1, 2), None, out.transpose(1, 2), lse
    dq, dk, dv, *_ = attention_backward(*rows, *x, *options, False)
    unseen = key.shape[2] - x.k.shape[1]
    dk, dv = (torch.nn.functional.pad(g, (0, 0, 0, 0, 0, unseen)) if unseen else g for g in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _like(like: Tensor, x: Tensor) -> Tensor:
    """x in the memory layout that torch's compiler expects."""
    empty = torch.empty_like(like)
    return x if x.stride() == empty.stride() else empty.copy_(x)

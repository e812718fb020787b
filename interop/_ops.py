"""The torch operators `jflash::attention_forward` and `jflash::attention_backward`.

Registered below autograd, with what torch needs to trace, batch and count them: fake implementations, vmap
rules, flop formulas. Differentiation is in `interop._autograd`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from interop import _bridge


class Options(NamedTuple):
    """The static arguments of both operators, in their order; -1 leaves a side of the window open."""

    scale: float | None  # None: D**-0.5
    left: int
    right: int  # 0 is causal
    softcap: float  # 0 is off
    dropout_p: float
    deterministic: bool


TENSORS = 7  # of the forward, before its options
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? dropout_seed, "
    "float? scale, int left, int right, float softcap, float dropout_p, bool deterministic"
)
_library = torch.library.Library("jflash", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides, torch.Tag.cudagraph_unsafe)
_library.define(f"attention_forward({_ARGUMENTS}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(
    f"attention_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, {_ARGUMENTS}, "
    "bool bias_gradient) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_bias)",
    tags=_TAGS,
)
attention_forward = torch.ops.jflash.attention_forward.default
attention_backward = torch.ops.jflash.attention_backward.default


def _forward(*args):
    """out [B, Sq, H, Dv] and lse [B, H, Sq].

    q [B, Sq, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]; bias (floating) and mask (bool, True = visible)
    [B|1, H|1, Sq|1, Sk|1]; alibi_slopes [B|1, H]; dropout_seed int32 [n, 2], a JAX random key for each B / n
    entries of the batch.
    """
    tensors, options = args[:TENSORS], Options(*args[TENSORS:])
    q, k, v = tensors[:3]
    if _nothing_to_see(q, k):
        out, lse = _empty_outputs(q, k, v)
        return out.zero_(), lse.fill_(float("-inf"))
    return tuple(_bridge.call(_kernels().forward, tensors, x64=_x64(q), options=options))


def _backward(*args):
    """dq, dk, dv and d_bias, which is empty without bias_gradient; d_lse may be None for zeros."""
    *operands, bias_gradient = args
    tensors, options = operands[: 4 + TENSORS], Options(*operands[4 + TENSORS :])
    q, k = tensors[4:6]
    if _nothing_to_see(q, k):
        return tuple(x.zero_() for x in _empty_gradients(tensors[4:], bias_gradient))
    kernel = _kernels().backward
    found = _bridge.call(kernel, tensors, x64=_x64(q), options=options, bias_gradient=bias_gradient)
    return tuple(found) if bias_gradient else (*found, q.new_empty(0))


@functools.cache
def _kernels():
    _bridge.load_jax()  # first, for its memory settings
    from interop import _kernels

    return _kernels


def _nothing_to_see(q: Tensor, k: Tensor) -> bool:
    """No query, or no key that one could see."""
    return q.numel() == 0 or k.numel() == 0


def _x64(q: Tensor) -> bool:
    return q.dtype == torch.float64


def _empty_outputs(q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor]:
    B, Sq, H, _ = q.shape
    lse_dtype = torch.float64 if _x64(q) else torch.float32
    return q.new_empty((B, Sq, H, v.shape[3])), q.new_empty((B, H, Sq), dtype=lse_dtype)


def _empty_gradients(tensors, bias_gradient: bool) -> tuple[Tensor, ...]:
    empty = [x.new_empty(x.shape) for x in tensors[: 4 if bias_gradient else 3]]
    return tuple(empty) if bias_gradient else (*empty, empty[0].new_empty(0))


torch.library.register_kernel("jflash::attention_forward", ("cpu", "cuda"), _forward, lib=_library)
torch.library.register_kernel("jflash::attention_backward", ("cpu", "cuda"), _backward, lib=_library)
torch.library.register_fake("jflash::attention_forward", _empty_outputs, lib=_library)


@torch.library.register_fake("jflash::attention_backward", lib=_library)
def _fake_backward(d_out, d_lse, out, lse, *args):
    return _empty_gradients(args, args[-1])


# --- vmap: the mapped axis becomes part of the batch


def _vmap_forward(info, in_dims, *args):
    batch = _length(args[0], in_dims[0])
    tensors = _fold_operands(info.batch_size, batch, args[:TENSORS], in_dims, bias_stays=True)
    outputs = attention_forward(*tensors, *args[TENSORS:])
    return tuple(x.unflatten(0, (info.batch_size, batch)) for x in outputs), (0, 0)


def _vmap_backward(info, in_dims, *args):
    n, bias_gradient = info.batch_size, args[-1]
    operands, operand_dims = args[4 : 4 + TENSORS], in_dims[4:]
    batch = _length(operands[0], operand_dims[0])
    cotangents = [_fold(n, batch, x, dim) for x, dim in zip(args[:4], in_dims, strict=False)]
    tensors = _fold_operands(n, batch, operands, operand_dims, bias_stays=not bias_gradient)
    *grads, d_bias = attention_backward(*cotangents, *tensors, *args[4 + TENSORS :])
    grads = [x.unflatten(0, (n, batch)) for x in grads]
    if not bias_gradient:
        return (*grads, d_bias), (0, 0, 0, None)
    d_bias = d_bias.unflatten(0, (n, batch))
    if _length(operands[3], operand_dims[3]) == 1:
        d_bias = d_bias.sum(1, keepdim=True)
    return (*grads, d_bias), (0, 0, 0, 0)


def _fold_operands(n: int, batch: int, tensors, in_dims, bias_stays: bool) -> list[Tensor | None]:
    """The operands with n examples in one batch; what every entry of it shares may stay as it is."""
    may_stay = (False, False, False, bias_stays, True, True)
    folded = []
    for x, dim, stays in zip(tensors, in_dims, may_stay, strict=False):
        shared = stays and x is not None and dim is None and x.shape[0] == 1
        folded.append(x if shared else _fold(n, batch, x, dim))
    seed, dim = tensors[-1], in_dims[TENSORS - 1]
    return [*folded, None if seed is None else _fold(n, _length(seed, dim), seed, dim)]


def _fold(n: int, length: int, x: Tensor | None, dim: int | None) -> Tensor | None:
    """[length or 1, ...], with or without a mapped axis at dim -> [n length, ...]."""
    if x is None:
        return None
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return x.expand(n, length, *x.shape[2:]).flatten(0, 1)


def _length(x: Tensor, dim: int | None) -> int:
    """Of the first axis that is not mapped."""
    return x.shape[1] if dim == 0 else x.shape[0]


torch.library.register_vmap("jflash::attention_forward", _vmap_forward, lib=_library)
torch.library.register_vmap("jflash::attention_backward", _vmap_backward, lib=_library)


# --- floating point operations, counted as torch counts its own attention: masked scores are work too


@register_flop_formula(torch.ops.jflash.attention_forward)
def _forward_flops(q, k, v, *_, **__) -> int:
    B, Sq, H, D = q
    return 2 * B * H * Sq * k[1] * (D + v[3])


@register_flop_formula(torch.ops.jflash.attention_backward)
def _backward_flops(d_out, d_lse, out, lse, q, k, v, *_, **__) -> int:
    B, Sq, H, D = q
    return 2 * B * H * Sq * k[1] * (3 * D + 2 * v[3])

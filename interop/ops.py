"""The torch operators `jflash::attention_forward` and `jflash::attention_backward`.

Registered below autograd, with what torch needs to trace, batch and count them: fake implementations, vmap
rules, flop formulas. Differentiation is in `interop.attention`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from interop import bridge, direct, lengths
from interop.operands import TENSORS, Operands, Options, given

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? mask, Tensor? q_segment_ids, "
    "Tensor? kv_segment_ids, Tensor? alibi_slopes, Tensor? dropout_seed, Tensor? key_ranges, "
    "float? scale, int left, int right, float softcap, float dropout_p, bool deterministic"
)
_library = torch.library.Library("jflash", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides, torch.Tag.cudagraph_unsafe)
_library.define(f"attention_forward({_ARGUMENTS}) -> (Tensor out, Tensor lse)", tags=TAGS)
_library.define(
    f"attention_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, {_ARGUMENTS}, "
    "bool bias_gradient) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_bias, Tensor d_sinks)",
    tags=TAGS,
)
attention_forward = torch.ops.jflash.attention_forward.default
attention_backward = torch.ops.jflash.attention_backward.default


def _forward(*args):
    """out [B, Sq, H, Dv] and lse [B, H, Sq]."""
    x, options = Operands(*args[:TENSORS]), Options(*args[TENSORS:])
    call = direct.signature("forward", given(x), options)
    if (found := direct.again(call, x)) is not None:
        return tuple(found)
    if _nothing_to_see(x):
        out, lse = empty_outputs(*x)
        return out.zero_(), lse.fill_(float("-inf"))
    (B, Sq, H, _), room = x.q.shape, _room("forward", x, options)
    if room is not None:
        x, options = lengths.padded(x, options, *room)
        call = direct.signature("forward", given(x), options)
    out, lse = direct.call(call, kernels().forward, x, options=options)
    return (out, lse) if room is None else (lengths.cut(out, B, Sq), lengths.cut(lse, B, H, Sq))


def _backward(*args):
    """Gradients of q, k, v, bias and sinks: empty for a bias without bias_gradient and for absent sinks.

    d_lse may be None for zeros.
    """
    *operands, bias_gradient = args
    rows, x, options = operands[:4], Operands(*operands[4 : 4 + TENSORS]), Options(*operands[4 + TENSORS :])
    if _nothing_to_see(x):
        return tuple(grad.zero_() for grad in _empty_gradients(x, bias_gradient))
    wanted = _wanted(x, bias_gradient)
    call = direct.signature("backward", (*rows, *given(x)), options, bias_gradient)
    if (found := direct.again(call, (*rows, *x))) is None:
        if (room := _room("backward", x, options)) is not None:
            x, options = lengths.padded(x, options, *room)
            rows = lengths.padded_rows(rows, room[0])
            call = direct.signature("backward", (*rows, *given(x)), options, bias_gradient)
        static = {"options": options, "bias_gradient": bias_gradient}
        found = direct.call(call, kernels().backward, (*rows, *x), **static)
        if room is not None:
            there = (t.shape for t in wanted if t is not None)
            found = [lengths.cut(grad, *shape) for grad, shape in zip(found, there, strict=True)]
    grads = iter(found)
    return tuple(x.q.new_empty(0) if t is None else next(grads) for t in wanted)


def _room(direction: str, x: Operands, options: Options) -> tuple[int, int] | None:
    """The lengths to pad a call to, if the backend that takes it anyway can learn the true ones at run time."""
    room = lengths.room(direction, x, options)
    return room if room is None or x.q.device.type == "cpu" or kernels().takes_lengths(x, options) else None


@functools.cache
def kernels():
    """The module `interop.kernels`, which imports JAX."""
    bridge.load_jax()  # first, for its memory settings
    from interop import kernels

    return kernels


def _nothing_to_see(tensors: Operands) -> bool:
    """No query, or no key that one could see."""
    return tensors.q.numel() == 0 or tensors.k.numel() == 0


def _wanted(tensors: Operands, bias_gradient: bool) -> tuple[Tensor | None, ...]:
    """What the backward gives gradients for: q, k, v, bias, sinks."""
    return *tensors[:3], tensors.bias if bias_gradient else None, tensors.sinks


def empty_outputs(q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor]:
    """Unwritten out and lse."""
    B, Sq, H, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((B, Sq, H, v.shape[3])), q.new_empty((B, H, Sq), dtype=wide)


def _empty_gradients(tensors: Operands, bias_gradient: bool) -> tuple[Tensor, ...]:
    wanted = _wanted(tensors, bias_gradient)
    return tuple(tensors.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)


torch.library.register_kernel("jflash::attention_forward", ("cpu", "cuda"), _forward, lib=_library)
torch.library.register_kernel("jflash::attention_backward", ("cpu", "cuda"), _backward, lib=_library)
torch.library.register_fake("jflash::attention_forward", empty_outputs, lib=_library)


@torch.library.register_fake("jflash::attention_backward", lib=_library)
def _fake_backward(d_out, d_lse, out, lse, *args):
    return _empty_gradients(Operands(*args[:TENSORS]), args[-1])


# --- vmap: the mapped axis becomes part of the batch


def _vmap_forward(info, in_dims, *args):
    batch = _length(args[0], in_dims[0])
    shared = {"bias", "sinks", "mask", "alibi_slopes", "key_ranges"}
    tensors = _fold_operands(info.batch_size, batch, args, in_dims, shared)
    outputs = attention_forward(*tensors, *args[TENSORS:])
    return tuple(x.unflatten(0, (info.batch_size, batch)) for x in outputs), (0, 0)


def _vmap_backward(info, in_dims, *args):
    n, bias_gradient = info.batch_size, args[-1]
    tensors, dims = Operands(*args[4 : 4 + TENSORS]), in_dims[4:]
    batch = _length(tensors.q, dims[0])
    cotangents = [_fold(n, batch, x, dim) for x, dim in zip(args[:4], in_dims, strict=False)]
    shared = {"mask", "alibi_slopes", "key_ranges"} | (set() if bias_gradient else {"bias"})
    folded = _fold_operands(n, batch, tensors, dims, shared)
    grads = attention_backward(*cotangents, *folded, *args[4 + TENSORS :])
    unfolded, out_dims = [], []
    for grad, x, dim in zip(grads, _wanted(tensors, bias_gradient), dims, strict=False):
        if x is not None:
            grad = grad.unflatten(0, (n, batch))
            grad = grad if _length(x, dim) == batch else grad.sum(1, keepdim=True)
        unfolded.append(grad)
        out_dims.append(None if x is None else 0)
    return tuple(unfolded), tuple(out_dims)


def _fold_operands(n: int, batch: int, tensors, in_dims, shared: set[str]) -> list[Tensor | None]:
    """The operands with n examples in one batch; one of `shared` stays as it is if all entries have it."""
    folded = []
    for name, x, dim in zip(Operands._fields, tensors, in_dims, strict=False):
        stays = x is not None and name in shared and dim is None and x.shape[0] == 1
        length = _length(x, dim) if x is not None and name == "dropout_seed" else batch
        folded.append(x if stays else _fold(n, length, x, dim))
    return folded


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

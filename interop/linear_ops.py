"""The torch operators `jflash::linear_forward` and `jflash::linear_backward`, and the autograd over them.

A tensor that is not there is an empty one among the outputs. torch.vmap runs one example after another.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from interop import bridge
from interop.attention import break_graph_in_func, first_order
from interop.ops import TAGS


class Operands(NamedTuple):
    """The tensors of both operators, in their order; H is the largest of Hq, Hk, Hv."""

    q: Tensor  # [B, Sq, Hq, D]
    k: Tensor  # [B, Sk, Hk, D]
    v: Tensor  # [B, Sk, Hv, Dv]
    log_decay: Tensor | None = None  # [H] or [B, Sq, H]
    mask: Tensor | None = None  # [B|1, H|1, Sq|1, Sk|1] bool or floating point
    kv: Tensor | None = None  # [N, H, D, Dv] float32
    z: Tensor | None = None  # [N, H, D] float32
    cu_seqlens: Tensor | None = None  # [N + 1] int32


class Options(NamedTuple):
    """Their static arguments, in their order, as of `jflash.linear_attention`."""

    causal: bool = True
    scale: float | None = None
    normalize: bool = False
    return_state: bool = False
    reverse: bool = False
    chunk_size: int | None = None


TENSORS = len(Operands._fields)
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? mask, Tensor? kv, Tensor? z, Tensor? cu_seqlens, "
    "bool causal, float? scale, bool normalize, bool return_state, bool reverse, int? chunk_size"
)
_library = torch.library.Library("jflash", "FRAGMENT")
_library.define(f"linear_forward({_ARGUMENTS}) -> (Tensor out, Tensor norm, Tensor kv, Tensor z)", tags=TAGS)
_library.define(
    f"linear_backward(Tensor d_out, Tensor? d_kv, Tensor? d_z, Tensor out, Tensor norm, {_ARGUMENTS}, "
    "bool decay_gradient, bool mask_gradient) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor d_log_decay, Tensor d_mask, Tensor d_kv, Tensor d_z)",
    tags=TAGS,
)
linear_forward = torch.ops.jflash.linear_forward.default
linear_backward = torch.ops.jflash.linear_backward.default


def attend(operands: Operands, options: Options) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out and the final kv and z, None where nobody asked or there is none; differentiable."""
    break_graph_in_func()
    out, _, kv, z = _Linear.apply(*operands, *options)
    return out, kv if options.return_state else None, z if options.return_state and options.normalize else None


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return linear_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, norm, _, _ = output
        ctx.save_for_backward(*inputs[:TENSORS], out, norm)
        ctx.options = inputs[TENSORS:]
        ctx.mark_non_differentiable(norm)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_out, _, d_kv, d_z):
        *tensors, out, norm = ctx.saved_tensors
        needs = Operands(*ctx.needs_input_grad[:TENSORS])
        d_out = torch.zeros_like(out) if d_out is None else d_out
        rows = d_out, d_kv, d_z, out, norm
        grads = _derivative(*rows, *tensors, *ctx.options, needs.log_decay, needs.mask)
        rest = (None,) * (1 + len(ctx.options))
        return *(grad if need else None for grad, need in zip(grads, needs, strict=False)), *rest


_derivative = first_order(
    linear_backward,
    "jflash linear attention has no second derivative: its backward is of first order only. "
    "interop.normal_linear_attention has derivatives of any order",
)


def _forward(*args):
    operands, options = Operands(*args[:TENSORS]), Options(*args[TENSORS:])
    found = bridge.call(_kernels().forward, operands, options=options)
    return placed(operands, _results(operands, options), found)


def _backward(*args):
    d_out, d_kv, d_z, out, norm, *rest = args
    operands, options, wanted = Operands(*rest[:TENSORS]), Options(*rest[TENSORS:-2]), tuple(rest[-2:])
    _, normal, kv, z = _results(operands, options)
    rows = (d_out, _or_zeros(d_kv, kv), _or_zeros(d_z, z), out, None if normal is None else norm)
    static = {"options": options, "wanted": wanted}
    found = bridge.call(_kernels().backward, (*rows, *operands), **static)
    return placed(operands, _gradients(operands, wanted), found)


@functools.cache
def _kernels():
    """The module `interop.linear_kernels`, which imports JAX."""
    bridge.load_jax()
    from interop import linear_kernels

    return linear_kernels


def _results(x: Operands, options: Options) -> list[Tensor | None]:
    """Unwritten out, norm, kv and z; None where there is none."""
    B, S, _, D = x.q.shape
    H, Dv = max(x.q.shape[2], x.k.shape[2], x.v.shape[2]), x.v.shape[3]
    N = B if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    wide = torch.promote_types(x.q.dtype, torch.float32)
    return [
        x.q.new_empty((B, S, H, Dv)),
        x.q.new_empty((B, S, H), dtype=wide) if options.normalize else None,
        x.q.new_empty((N, H, D, Dv), dtype=wide) if options.return_state else None,
        x.q.new_empty((N, H, D), dtype=wide) if options.return_state and options.normalize else None,
    ]


def _gradients(x: Operands, wanted: tuple[bool, bool]) -> list[Tensor | None]:
    """Unwritten gradients of all operands but cu_seqlens; None where there is none."""
    there = (True, True, True, *wanted, True, True)
    return [None if t is None or not here else t.new_empty(t.shape) for t, here in zip(x, there, strict=False)]


def placed(x: Operands, wanted: list[Tensor | None], found) -> tuple[Tensor, ...]:
    """What was found in the places where something is wanted, and empty tensors elsewhere."""
    rest = iter(found)
    return tuple(x.q.new_empty(0) if t is None else next(rest) for t in wanted)


def _or_zeros(cotangent: Tensor | None, of: Tensor | None) -> Tensor | None:
    """The cotangent of a result: none if that is none, whatever the compiler gives for it, zeros if nobody gave one."""
    if of is None:
        return None
    return torch.zeros_like(of) if cotangent is None else cotangent


torch.library.register_kernel("jflash::linear_forward", ("cpu", "cuda"), _forward, lib=_library)
torch.library.register_kernel("jflash::linear_backward", ("cpu", "cuda"), _backward, lib=_library)


@torch.library.register_fake("jflash::linear_forward", lib=_library)
def _fake_forward(*args):
    operands = Operands(*args[:TENSORS])
    results = _results(operands, Options(*args[TENSORS:]))
    return placed(operands, results, filter(torch.is_tensor, results))


@torch.library.register_fake("jflash::linear_backward", lib=_library)
def _fake_backward(*args):
    operands = Operands(*args[5 : 5 + TENSORS])
    grads = _gradients(operands, args[-2:])
    return placed(operands, grads, filter(torch.is_tensor, grads))


def one_after_another(operator):
    """A vmap rule that calls an operator for each example."""

    def rule(info, in_dims, *args):
        results = []
        for n in range(info.batch_size):
            examples = (x if dim is None else x.select(dim, n) for x, dim in zip(args, in_dims, strict=True))
            results.append(operator(*examples))
        return tuple(torch.stack(xs) for xs in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


torch.library.register_vmap("jflash::linear_forward", one_after_another(linear_forward), lib=_library)
torch.library.register_vmap("jflash::linear_backward", one_after_another(linear_backward), lib=_library)

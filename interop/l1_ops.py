"""The torch operators `jflash::l1_forward` and `jflash::l1_backward`, and the autograd over them.

One pair for attention, scores and listed pairs, which `Options.function` tells apart. A tensor that is not there
is an empty one among the outputs. torch.vmap runs one example after another.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from interop import bridge
from interop.attention import break_graph_in_func, first_order
from interop.linear_ops import one_after_another, placed
from interop.ops import TAGS


class Operands(NamedTuple):
    """The tensors of both operators, in their order; the first six have gradients."""

    q: Tensor  # [B, Sq, H, D]
    k: Tensor  # [B, Sk, Hk, D]
    v: Tensor | None = None  # [B, Sk, Hk, Dv]; scores have none
    vb: Tensor | None = None  # [B, Sq, Hk, Dv], of pairs that go both ways
    bias: Tensor | None = None  # [B|1, H|1, Sq|1, Sk|1] floating point
    sink: Tensor | None = None  # [H] or [B, H] floating point
    mask: Tensor | None = None  # [B|1, H|1, Sq|1, Sk|1] bool, True = visible
    q_segment_ids: Tensor | None = None  # [B, Sq] int32
    kv_segment_ids: Tensor | None = None  # [B, Sk] int32
    cu_seqlens_q: Tensor | None = None  # [N + 1] int32
    cu_seqlens_k: Tensor | None = None  # [N + 1] int32; None: those of the queries
    pairs: Tensor | None = None  # [E, 2] int32


class Options(NamedTuple):
    """Their static arguments, in their order, as of the functions of `jflash`; -1 leaves a side of the window open."""

    function: str  # "attention", "scores" or "sparse"
    scale: float | None = None
    kind: str = "neg"
    eps: float = 1e-3
    weight: str = "softmax"
    center: bool = False
    left: int = -1
    right: int = -1  # 0 is causal
    exclude_diagonal: bool = False
    compute: str = "auto"
    layout: str = "bhts"


TENSORS = len(Operands._fields)
DIFFERENTIABLE = 6
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor? v, Tensor? vb, Tensor? bias, Tensor? sink, Tensor? mask, Tensor? q_segment_ids, "
    "Tensor? kv_segment_ids, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? pairs, "
    "str function, float? scale, str kind, float eps, str weight, bool center, int left, int right, "
    "bool exclude_diagonal, str compute, str layout"
)
_library = torch.library.Library("jflash", "FRAGMENT")
_library.define(f"l1_forward({_ARGUMENTS}) -> (Tensor out, Tensor lse)", tags=TAGS)
_library.define(
    f"l1_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, {_ARGUMENTS}, bool bias_gradient) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor d_vb, Tensor d_bias, Tensor d_sink)",
    tags=TAGS,
)
l1_forward = torch.ops.jflash.l1_forward.default
l1_backward = torch.ops.jflash.l1_backward.default


def attend(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """out and lse, which is empty but for attention; differentiable."""
    break_graph_in_func()
    return _L1.apply(*operands, *options)


class _L1(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return l1_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:TENSORS], *output)
        ctx.options = inputs[TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        *tensors, out, lse = ctx.saved_tensors
        needs = Operands(*ctx.needs_input_grad[:TENSORS])
        d_out = torch.zeros_like(out) if d_out is None else d_out
        grads = _derivative(d_out, d_lse, out, lse, *tensors, *ctx.options, needs.bias)
        rest = (None,) * (TENSORS - DIFFERENTIABLE + len(ctx.options))
        return *(grad if need else None for grad, need in zip(grads, needs[:DIFFERENTIABLE], strict=True)), *rest


_derivative = first_order(
    l1_backward, "jflash L1 attention has no second derivative: its backward is of first order only"
)


def _forward(*args):
    x, options = Operands(*args[:TENSORS]), Options(*args[TENSORS:])
    out, lse = _results(x, options)
    if 0 in (out.numel(), x.k.numel()) or (x.pairs is not None and x.pairs.numel() == 0):
        return out.zero_(), lse.fill_(float("-inf") if options.weight == "softmax" else 0.0)
    found = bridge.call(_kernels().forward, x, options=options)
    return placed(x, [out, lse if lse.numel() else None], found)


def _backward(*args):
    *rows, bias_gradient = args
    x, options = Operands(*rows[4 : 4 + TENSORS]), Options(*rows[4 + TENSORS :])
    wanted = _gradients(x, bias_gradient)
    if 0 in (rows[0].numel(), x.k.numel()) or (x.pairs is not None and x.pairs.numel() == 0):
        return placed(x, wanted, (t.zero_() for t in wanted if t is not None))
    static = {"options": options, "bias_gradient": bias_gradient}
    lse = rows[3] if rows[3].numel() else None
    found = bridge.call(
        _kernels().backward, (rows[0], rows[1] if lse is not None else None, rows[2], lse, *x), **static
    )
    return placed(x, wanted, found)


@functools.cache
def _kernels():
    """The module `interop.l1_kernels`, which imports JAX."""
    bridge.load_jax()
    from interop import l1_kernels

    return l1_kernels


def _results(x: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """Unwritten out and lse."""
    (B, Sq, H, _), Sk = x.q.shape, x.k.shape[1]
    wide = torch.promote_types(x.q.dtype, torch.float32)
    if options.function == "scores":
        size = {"b": B, "h": H, "t": Sq, "s": Sk}
        return x.q.new_empty([size[axis] for axis in options.layout], dtype=wide), x.q.new_empty(0, dtype=wide)
    assert x.v is not None
    lse = (B, H, Sq) if options.function == "attention" else (0,)
    return x.q.new_empty((B, Sq, H, x.v.shape[3])), x.q.new_empty(lse, dtype=wide)


def _gradients(x: Operands, bias_gradient: bool) -> list[Tensor | None]:
    """Unwritten gradients; None where there is none."""
    wanted = x._replace(bias=x.bias if bias_gradient else None)[:DIFFERENTIABLE]
    return [None if t is None else t.new_empty(t.shape) for t in wanted]


torch.library.register_kernel("jflash::l1_forward", ("cpu", "cuda"), _forward, lib=_library)
torch.library.register_kernel("jflash::l1_backward", ("cpu", "cuda"), _backward, lib=_library)


@torch.library.register_fake("jflash::l1_forward", lib=_library)
def _fake_forward(*args):
    return _results(Operands(*args[:TENSORS]), Options(*args[TENSORS:]))


@torch.library.register_fake("jflash::l1_backward", lib=_library)
def _fake_backward(*args):
    x = Operands(*args[4 : 4 + TENSORS])
    wanted = _gradients(x, args[-1])
    return placed(x, wanted, filter(torch.is_tensor, wanted))


torch.library.register_vmap("jflash::l1_forward", one_after_another(l1_forward), lib=_library)
torch.library.register_vmap("jflash::l1_backward", one_after_another(l1_backward), lib=_library)

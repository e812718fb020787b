"""The one differentiable attention behind every public function, and how each kind of autograd reaches it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from interop import _arguments, direct
from interop.operands import TENSORS, Operands, Options
from interop.ops import attention_backward, attention_forward


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_ranges: Tensor | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Any]:
    """(out, lse) of `jflash::attention_forward`, differentiable in all but alibi_slopes.

    attn_mask is bool, True = visible, or floating and added; bias is added too. Both broadcast to
    [B, H, Sq, Sk]. segment_ids are integers for the queries [B, Sq] and for the keys [B, Sk]; sinks and
    alibi_slopes are [H] or [B, H]. key_ranges is of `interop.key_ranges` and has the window in it; alibi_slopes
    may then be [1, H, Sq]. Without with_lse lse may be None.
    """
    if torch.are_deterministic_algorithms_enabled():
        options = options._replace(deterministic=True)
    if attn_mask is bias is segment_ids is alibi_slopes is sinks is key_ranges is None:
        found = _repeated(q, k, v, options, with_lse)
        if found is not None:
            return found
    for name, x in (("q", q), ("k", k), ("v", v)):
        _arguments.check_axes(name, x, "[batch, seq, heads, dim]")
    q, k, v = autocast(q, k, v)
    _arguments.check_qkv(q, k, v)
    mask = None
    if attn_mask is not None:
        attn_mask = _arguments.square("attn_mask", attn_mask, q, k)
        mask = attn_mask if attn_mask.dtype == torch.bool else None
    if bias is not None:
        bias = _arguments.square("bias", bias, q, k)
    if attn_mask is not None and mask is None:
        bias = attn_mask if bias is None else bias + attn_mask
    q_ids, kv_ids = (None, None) if segment_ids is None else _arguments.segments(segment_ids, q, k)
    operands = Operands(
        q=q,
        k=k,
        v=v,
        bias=bias,
        sinks=None if sinks is None else _arguments.sinks(sinks, q, k),
        mask=mask,
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        alibi_slopes=None if alibi_slopes is None else _arguments.slopes(alibi_slopes, q, key_ranges is not None),
        dropout_seed=draw_seed(q.device) if options.dropout_p else None,
        key_ranges=key_ranges,
    )
    return _function().apply(*operands, *options)


def _repeated(q: Tensor, k: Tensor, v: Tensor, options: Options, with_lse: bool) -> tuple | None:
    """The results of a call like one that torch has launched, so that all about it has been checked; else None."""
    if not _are_plain(q, k, v):
        return None
    operands = q, k, v
    launch = direct.launches.get(direct.signature("forward", operands, options))
    if launch is None:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Repeated.apply(q, k, v, options, launch)
    return tuple(launch(operands)) if with_lse else (launch.first(operands), None)


_PLAIN = {Tensor, type(None)}


def _are_plain(*tensors: Tensor | None) -> bool:
    """Whether the operator would do nothing but run: nobody transforms, traces or records calls."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if is_in_torch_dispatch_mode() or torch._C._get_tracing_state() or torch.autograd.profiler._is_profiler_enabled:
        return False
    if forward_ad._current_level >= 0 or torch._C._is_any_autocast_enabled():
        return False
    return _PLAIN.issuperset(map(type, tensors))


def autocast(*tensors: Tensor) -> list[Tensor] | tuple[Tensor, ...]:
    """Under torch.autocast, the tensors in its dtype, as torch's own attention takes them."""
    if torch.compiler.is_compiling():
        tensors = tuple(x.view_as(x) for x in tensors)  # Dynamo gives an autograd.Function no tensor twice
    kind = tensors[0].device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def draw_seed(device: torch.device) -> Tensor:
    """A JAX random key, int32 [1, 2], from torch's default generator of the device, drawn on the device."""
    return torch.randint(-(2**31), 2**31, (1, 2), dtype=torch.int32, device=device)


def _function() -> type[torch.autograd.Function]:
    """The autograd.Function that the caller's kind of differentiation can see through."""
    if torch._C._are_functorch_transforms_active():
        break_graph_in_func()
        return _Functorch
    return _Traced if torch.compiler.is_compiling() else _Eager


def break_graph_in_func() -> None:
    """Leaves a torch.func transform to eager mode: Dynamo would trace the forward alone, with a gradient of zeros."""
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        torch._dynamo.graph_break(msg="jflash attention in a torch.func transform is not traced")


class _Traced(torch.autograd.Function):
    """For torch.compile."""

    @staticmethod
    def forward(ctx, *args):
        outputs = attention_forward(*args)
        _save(ctx, args, outputs)
        return outputs

    @staticmethod
    def backward(ctx, d_out, d_lse):
        return _cotangents(ctx, d_out, d_lse)


class _Eager(_Traced):
    """For eager mode. A separate setup_context would cost 30 us a call; Dynamo takes no class with a jvp."""

    @staticmethod
    def jvp(ctx, *tangents):
        return _no_forward_mode()


class _Repeated(_Eager):
    """For a call that torch has launched before, in half the time."""

    @staticmethod
    def forward(ctx, q, k, v, options, launch):
        out, lse = launch((q, k, v))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse = ctx.saved_tensors
        tensors = d_out, d_lse, out, lse, q, k, v
        # Without storage they are many at once, of `torch.autograd.grad(..., is_grads_batched=True)`.
        stored = d_out is not None and all(torch._C._has_storage(x) for x in (d_out, d_lse) if x is not None)
        if stored and not torch.is_grad_enabled() and _are_plain(*tensors):
            found = direct.again(direct.signature("backward", tensors, ctx.options, False), tensors)
            if found is not None:
                return *found, None, None
        needs = Operands(*ctx.needs_input_grad[:3])
        grads = _gradients(Operands(q, k, v), ctx.options, (d_out, d_lse, out, lse), needs)
        return *grads[:3], None, None


class _Functorch(torch.autograd.Function):
    """For torch.func, which must see forward and setup_context apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return attention_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        return _cotangents(ctx, d_out, d_lse)

    @staticmethod
    def jvp(ctx, *tangents):
        return _no_forward_mode()


def first_order(operator: Callable, why: str) -> Callable:
    """The operator of a backward, so that its results raise where somebody differentiates them."""

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return operator(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *cotangents):
            raise NotImplementedError(why)

    def run(*args):
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return Once.apply(*args) if differentiable else operator(*args)

    return run


_derivative = first_order(
    attention_backward,
    "jflash attention has no second derivative: the kernels have a backward of first order only. Use "
    "torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)",
)


def _save(ctx, args, outputs) -> None:
    ctx.save_for_backward(*args[:TENSORS], *outputs)
    ctx.options = args[TENSORS:]
    ctx.set_materialize_grads(False)


def _cotangents(ctx, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the arguments of the forward."""
    *operands, out, lse = ctx.saved_tensors
    needs = Operands(*ctx.needs_input_grad[:TENSORS])
    grads = _gradients(Operands(*operands), ctx.options, (d_out, d_lse, out, lse), needs)
    return *grads, *(None,) * (TENSORS - len(grads) + len(ctx.options))


def _gradients(x: Operands, options, rows, needs: Operands) -> tuple[Tensor | None, ...]:
    """Of q, k, v, bias and sinks, from rows d_out, d_lse, out and lse."""
    d_out, d_lse, out, lse = rows
    if d_out is None and d_lse is None:
        return (None,) * 5
    d_out = torch.zeros_like(out) if d_out is None else d_out
    *grads, d_bias, d_sinks = _derivative(d_out, d_lse, out, lse, *x, *options, bool(needs.bias))
    return (*grads, d_bias if needs.bias else None, d_sinks if needs.sinks else None)


def _no_forward_mode():
    raise NotImplementedError(
        "jflash attention has no forward-mode derivative: the kernels differentiate backward only. Use "
        "torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
    )

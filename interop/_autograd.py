"""The one differentiable attention behind every public function, and how each kind of autograd reaches it."""

from __future__ import annotations

import torch
from torch import Tensor

from interop import _arguments
from interop._ops import TENSORS, Options, attention_backward, attention_forward


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `jflash::attention_forward`, differentiable in q, k, v and a floating attn_mask."""
    q, k, v = _autocast(q, k, v)
    _arguments.check_qkv(q, k, v)
    bias = mask = None
    if alibi_slopes is not None:
        alibi_slopes = _arguments.slopes(alibi_slopes, q)
    if attn_mask is not None:
        attn_mask = _arguments.square("attn_mask", attn_mask, q, k)
        bias, mask = (None, attn_mask) if attn_mask.dtype == torch.bool else (attn_mask, None)
    _arguments.check_devices(q, k=k, v=v, attn_mask=attn_mask, alibi_slopes=alibi_slopes)
    seed = _draw_seed(q.device) if options.dropout_p else None
    if torch.are_deterministic_algorithms_enabled():
        options = options._replace(deterministic=True)
    return _function().apply(q, k, v, bias, mask, alibi_slopes, seed, *options)


def _autocast(*tensors: Tensor) -> list[Tensor] | tuple[Tensor, ...]:
    """Under torch.autocast, the tensors in its dtype, as torch's own attention takes them."""
    kind = tensors[0].device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def _draw_seed(device: torch.device) -> Tensor:
    """A JAX random key, int32 [1, 2], from torch's default generator of the device, drawn on the device."""
    return torch.randint(-(2**31), 2**31, (1, 2), dtype=torch.int32, device=device)


def _function() -> type[torch.autograd.Function]:
    """The autograd.Function that the caller's kind of differentiation can see through."""
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            # Dynamo would trace the forward alone and give zeros for its gradient.
            torch._dynamo.graph_break(msg="jflash attention in a torch.func transform is not traced")
        return _Functorch
    return _Traced if torch.compiler.is_compiling() else _Eager


class _Traced(torch.autograd.Function):
    """For torch.compile."""

    @staticmethod
    def forward(ctx, *args):
        outputs = attention_forward(*args)
        _save(ctx, args, outputs)
        return outputs

    @staticmethod
    def backward(ctx, d_out, d_lse):
        return _gradients(ctx, d_out, d_lse)


class _Eager(_Traced):
    """For eager mode. A separate setup_context would cost 30 us a call; Dynamo takes no class with a jvp."""

    @staticmethod
    def jvp(ctx, *tangents):
        return _no_forward_mode()


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
        return _gradients(ctx, d_out, d_lse)

    @staticmethod
    def jvp(ctx, *tangents):
        return _no_forward_mode()


class _FirstOrderOnly(torch.autograd.Function):
    """`jflash::attention_backward`; differentiating it raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return attention_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise NotImplementedError(
            "jflash attention has no second derivative: the kernels have a backward of first order only. Use "
            "torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
        )


def _save(ctx, args, outputs) -> None:
    ctx.save_for_backward(*args[:TENSORS], *outputs)
    ctx.options = args[TENSORS:]
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out: Tensor | None, d_lse: Tensor | None):
    """Cotangents for the arguments of the forward."""
    *tensors, out, lse = ctx.saved_tensors
    rest = (None,) * (len(tensors) + len(ctx.options) - 4)
    if d_out is None and d_lse is None:
        return (None, None, None, None, *rest)
    if d_out is None:
        d_out = torch.zeros_like(out)
    bias_gradient = ctx.needs_input_grad[3]
    args = (d_out, d_lse, out, lse, *tensors, *ctx.options, bias_gradient)
    differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    *grads, d_bias = _FirstOrderOnly.apply(*args) if differentiable else attention_backward(*args)
    return (*grads, d_bias if bias_gradient else None, *rest)


def _no_forward_mode():
    raise NotImplementedError(
        "jflash attention has no forward-mode derivative: the kernels differentiate backward only. Use "
        "torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
    )

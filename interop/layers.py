"""Norms, dense layers and cross-entropy for torch tensors, under flash_attn's names: `jflash.layers` by XLA.

Each is one call of a program that XLA has fused. For small tensors torch's own functions, which have no call into
JAX to pay for, are the better choice; under torch.compile these are graph breaks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from interop import bridge


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
) -> Any:
    """`out = h / sqrt(mean(h^2) + eps) * weight + bias` over the last axis, with `h = x + residual`.

    Args:
        x: [..., D] of a floating type; weight, bias: [D]; residual: in x's shape.
        prenorm: return (out, h), h in the residual's dtype, or in x's.

    Returns:
        out in x's dtype. Sums are in float32 or wider. Differentiable once.

    Source: Zhang and Sennrich, RMSNorm (arXiv 1910.07467); the interface of flash_attn 2.
    """
    return _normed(_run("rms_norm", x, weight, bias, residual, eps=float(eps)), x, residual, prenorm)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
) -> Any:
    """`out = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias`, with `h = x + residual`; else as `rms_norm_fn`."""
    return _normed(_run("layer_norm", x, weight, bias, residual, eps=float(eps)), x, residual, prenorm)


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """`loss = lse - (1 - e) s[label] - e mean(s) + z` and its part `z = lse_square_scale lse^2`, of each row.

    s is `logit_scale logits`, lse the log of the sum of its exponentials, e the label_smoothing.

    Args:
        logits: [..., V] of a floating type; labels: int32 or int64 [...], in [0, V) or ignore_index.

    Returns:
        (loss, z) [...] in float32 or wider, 0 where the label is ignore_index. z has no gradient of its own.

    Source: the interface of flash_attn 2's `cross_entropy_loss`.
    """
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels.dtype={labels.dtype} must be torch.int32 or torch.int64")
    options = {"label_smoothing": float(label_smoothing), "logit_scale": float(logit_scale)}
    options |= {"lse_square_scale": float(lse_square_scale), "ignore_index": int(ignore_index)}
    loss, z = _run("cross_entropy", logits, labels.to(torch.int32), **options)
    return loss, z.detach()


def fused_dense_func(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`out = x weight^T + bias` of x [..., I], weight [O, I] and bias [O], in x's dtype."""
    return _run("dense", x, weight, bias)[0]


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
) -> Tensor:
    """`out = activation(x weight1^T + bias1) weight2^T + bias2`; the hidden layer is computed again backward.

    activation: "gelu", "gelu_approx" (by tanh), "relu", "sqrelu" (relu squared) or "silu".
    """
    return _run("mlp", x, weight1, weight2, bias1, bias2, activation=activation)[0]


class RMSNorm(nn.Module):
    """`rms_norm_fn` with a weight of its own, ones at first."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False) -> Any:
        return rms_norm_fn(x, self.weight, None, residual, self.eps, prenorm)


class CrossEntropyLoss(nn.Module):
    """`cross_entropy_loss`, by row ("none"), summed, or averaged over the labels that are not ignored."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
    ):
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'")
        self.ignore_index, self.reduction = ignore_index, reduction
        self.options = label_smoothing, logit_scale, lse_square_scale

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss, _ = cross_entropy_loss(logits, labels, *self.options, self.ignore_index)
        if self.reduction == "none":
            return loss
        return loss.sum() / (1 if self.reduction == "sum" else (labels != self.ignore_index).sum())


def _normed(found: tuple[Tensor, ...], x: Tensor, residual: Tensor | None, prenorm: bool):
    if not prenorm:
        return found[0]
    return found[0], x if residual is None else found[1]


def _call(name: str, *tensors: Tensor | None, **options) -> tuple[Tensor, ...]:
    return _Layer.apply(name, tuple(sorted(options.items())), *tensors)


_run: Any = torch.compiler.disable(_call)


class _Layer(torch.autograd.Function):
    """A function of `jflash.layers` and its gradients."""

    @staticmethod
    def forward(ctx, name, options, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.call = {"name": name, "options": options}
        return tuple(bridge.call(_kernels().forward, tensors, **ctx.call))

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        tensors = ctx.saved_tensors
        found = iter(bridge.call(_kernels().backward, (*cotangents, *tensors), **ctx.call, outputs=len(cotangents)))
        floating = (x is not None and x.is_floating_point() for x in tensors)
        return None, None, *(next(found) if has else None for has in floating)


@functools.cache
def _kernels():
    bridge.load_jax()
    from interop import layer_kernels

    return layer_kernels

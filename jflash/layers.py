"""What stands between attentions: norms, dense layers, cross-entropy. Thin functions, which XLA fuses by itself."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jflash._arguments import array
from jflash._transforms import by_standard_rules

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_approx": jax.nn.gelu,
    "relu": jax.nn.relu,
    "sqrelu": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


@by_standard_rules
def rms_norm(
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    residual: jax.Array | None = None,
    eps: float = 1e-6,
) -> Any:
    """`out = h / sqrt(mean(h^2) + eps) * weight + bias` over the last axis, with `h = x + residual`.

    Args:
        x: [..., D]; weight: [D], default ones; bias: [D], default zeros.
        residual: in x's shape, of any floating type.

    Returns:
        out in x's dtype; with a residual (out, h), h in the residual's dtype. Sums are in float32 or wider.

    Raises:
        ValueError, TypeError: an argument breaks a rule above.

    Source: Zhang and Sennrich, RMSNorm (arXiv 1910.07467).
    """
    h = _sum(x, residual)
    out = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + eps)
    return _normed(x, residual, h, out, weight, bias)


@by_standard_rules
def layer_norm(
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    residual: jax.Array | None = None,
    eps: float = 1e-5,
) -> Any:
    """`out = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias` over the last axis, with `h = x + residual`.

    Arguments as for `rms_norm`. Source: Ba et al., Layer Normalization (arXiv 1607.06450).
    """
    h = _sum(x, residual)
    centred = h - jnp.mean(h, axis=-1, keepdims=True)
    out = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return _normed(x, residual, h, out, weight, bias)


@by_standard_rules
def dense(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None, *, activation: str | None = None):
    """`out = activation(x weight + bias)` of x [..., I] and weight [I, O], summed in float32 or wider; x's dtype.

    activation: None, "gelu", "gelu_approx" (by tanh), "relu", "sqrelu" (relu squared) or "silu".
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be None or one of {', '.join(map(repr, ACTIVATIONS))}")
    x, weight = _floating("x", x), _floating("weight", weight)
    if weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"weight.shape={weight.shape} must be [I, O] with I={x.shape[-1]}, the last axis of x")
    out = jnp.matmul(x, weight, preferred_element_type=_wide(x))
    if bias is not None:
        _check_last("bias", bias, out)
        out = out + bias
    return (out if activation is None else ACTIVATIONS[activation](out)).astype(x.dtype)


@by_standard_rules
def mlp(
    x: jax.Array,
    weight1: jax.Array,
    weight2: jax.Array,
    bias1: jax.Array | None = None,
    bias2: jax.Array | None = None,
    *,
    activation: str = "gelu_approx",
) -> jax.Array:
    """`dense(dense(x, weight1, bias1, activation), weight2, bias2)`; the hidden layer is computed again backward."""
    hidden = jax.checkpoint(functools.partial(dense, activation=activation))(x, weight1, bias1)
    return dense(hidden, weight2, bias2)


@by_standard_rules
def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
) -> tuple[jax.Array, jax.Array]:
    """`loss = lse - (1 - e) s[label] - e mean(s) + z` and its part `z = lse_square_scale lse^2`, of each row.

    s is `logit_scale logits`, lse the log of the sum of its exponentials, e the label_smoothing. The backward forms
    the weights anew from the logits and lse, so nothing as large as the logits is kept but these.

    Args:
        logits: [..., V], of any floating type; labels: integers [...], in [0, V) or ignore_index.

    Returns:
        (loss, z) [...] in float32 or wider, 0 where the label is ignore_index, NaN where it is out of range.

    Raises:
        ValueError, TypeError: an argument breaks a rule above. The values of labels do not raise.

    Source: the interface of flash_attn's `cross_entropy_loss`; the z-loss of Chowdhery et al., PaLM (arXiv 2204.02311).
    """
    logits, labels = _floating("logits", logits), jnp.asarray(array("labels", labels))
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels.dtype={labels.dtype.name} must be an integer type")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels.shape={labels.shape} must be {logits.shape[:-1]}, that of logits but the last axis")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    options = float(label_smoothing), float(logit_scale), float(lse_square_scale), int(ignore_index)
    return _losses(logits, labels.astype(jnp.promote_types(labels.dtype, jnp.int32)), options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _losses(logits, labels, options):
    return _losses_forward(logits, labels, options)[0]


def _losses_forward(logits, labels, options):
    smoothing, scale, z_scale, ignored = options
    s = logits.astype(_wide(logits)) * scale
    lse = jax.nn.logsumexp(s, axis=-1)
    own = jnp.take_along_axis(s, jnp.maximum(labels, 0)[..., None], axis=-1, mode="clip")[..., 0]
    z = z_scale * jnp.square(lse)
    loss = lse - (1 - smoothing) * own + z
    if smoothing:  # else a logit of -inf would make it 0 * -inf
        loss = loss - smoothing * jnp.mean(s, axis=-1)
    kept, outside = labels != ignored, (labels < 0) | (labels >= s.shape[-1])
    loss = jnp.where(kept & outside, jnp.nan, jnp.where(kept, loss, 0))
    return (loss, jnp.where(kept, z, 0)), (logits, labels, lse)


@by_standard_rules
def _losses_backward(options, saved, cotangents):
    smoothing, scale, z_scale, ignored = options
    logits, labels, lse = saved
    d_loss, d_z = cotangents
    weights = jnp.exp(logits.astype(lse.dtype) * scale - lse[..., None])
    own = jnp.arange(logits.shape[-1]) == labels[..., None]
    of_lse = d_loss + 2 * z_scale * lse * (d_loss + d_z)
    d = of_lse[..., None] * weights - d_loss[..., None] * ((1 - smoothing) * own + smoothing / logits.shape[-1])
    return jnp.where((labels != ignored)[..., None], scale * d, 0).astype(logits.dtype), None


_losses.defvjp(_losses_forward, _losses_backward)


def _sum(x, residual) -> jax.Array:
    """x + residual in float32 or wider."""
    x = _floating("x", x)
    if residual is None:
        return x.astype(_wide(x))
    residual = _floating("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual.shape={residual.shape} must be {x.shape}, that of x")
    return x.astype(_wide(x)) + residual


def _normed(x, residual, h, out, weight, bias):
    _check_last("weight", weight, x)
    _check_last("bias", bias, x)
    out = out if weight is None else out * weight
    out = (out if bias is None else out + bias).astype(x.dtype)
    return out if residual is None else (out, h.astype(residual.dtype))


def _floating(name: str, x) -> jax.Array:
    x = jnp.asarray(array(name, x))
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
        raise TypeError(f"{name} of dtype {x.dtype.name} and shape {x.shape} must be of a floating type with an axis")
    return x


def _check_last(name: str, x, like) -> None:
    if x is not None and array(name, x).shape != like.shape[-1:]:
        raise ValueError(f"{name}.shape={x.shape} must be [{like.shape[-1]}], the last axis")


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)

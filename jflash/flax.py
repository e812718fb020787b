"""Attention for Flax: `attention_fn=` of `linen.MultiHeadDotProductAttention` and `nnx.MultiHeadAttention`.

nnx.MultiHeadAttention(..., attention_fn=jflash.flax.attention_fn)
nnx.MultiHeadAttention(..., attention_fn=jflash.flax.make_attention_fn(causal=True, window=(1023, 0)))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.nnx.nn.dtypes import promote_dtype as _promote_dtype
from jax import lax

from jflash._arguments import check_qkv
from jflash.attention import flash_attention
from jflash.xla.scores import no_matmul_precision_is_set

__all__ = ["attention_fn", "make_attention_fn"]


class _Call(NamedTuple):
    """The arguments of one `flash_attention`, under its names."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None
    dropout_rate: float
    dropout_key: jax.Array | None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    segment_ids: Any = None
    alibi_slopes: jax.Array | None = None
    sinks: jax.Array | None = None
    scale: float | None = None
    implementation: str | None = None


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    *,
    is_causal: bool = False,
    promote_dtype: Any = _promote_dtype,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> jax.Array:
    """Softmax attention in O(N) memory, with the arguments of both `dot_product_attention`s of Flax.

    Equal to Flax's own up to rounding, with two differences. A query whose keys are all masked gives 0 here
    and the mean of all values there. Dropout has Flax's distribution, drawn from jflash's own generator.

    Flax's own function takes what needs the weights as a matrix, in O(Sq Sk) memory: `module` (sown weights),
    `einsum_dot_general`, `qk_attn_weights_einsum`, `attn_weights_value_einsum`, and, for float32, a
    `precision` that is neither the default nor the highest. 16-bit and float64 operands satisfy every
    `precision` as they are.

    Args:
        query: [batch..., Sq, H, D], any number of batch axes. D <= 256.
        key: [batch..., Sk, Hk, D]. H is a multiple of Hk.
        value: [batch..., Sk, Hk, Dv]. Dv <= 256.
        bias: added to the scores; broadcasts to [batch..., H, Sq, Sk]. Differentiable.
        mask: nonzero = visible, in any dtype; broadcasts to [batch..., H, Sq, Sk]. Axes of size 1 stay so.
        broadcast_dropout: one dropout mask for all batch entries and heads. False draws one for each, and
            spares a copy of q, k and v, and of a bias or mask that differs by batch entry or head.
        dropout_rng: a `jax.random` key, typed or raw; needed if weights are dropped.
        dropout_rate: probability of dropping a weight, in [0, 1).
        deterministic: True drops nothing.
        dtype: what to compute in; default the common dtype of query, key and value. The Hopper kernels take
            bfloat16 and float16; float32 runs in blocked XLA, its products in full precision unless
            `jax_default_matmul_precision` is set.
        is_causal: query i sees keys j <= i. As in Flax both count from the first, also where Sq != Sk.
        promote_dtype: brings (query, key, value) to one dtype, as in nnx.
        force_fp32_for_softmax: honoured always: statistics are in float32 or wider either way.
        options: set by `make_attention_fn`.

    Returns:
        [batch..., Sq, H, Dv] in the dtype computed in.

    Raises:
        ValueError, TypeError: an argument breaks a rule above or one of `jflash.flash_attention`.
        NotImplementedError: an option of `make_attention_fn` cannot be combined with another argument.
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    batch = query.shape[:-3]
    if not batch == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(f"batch axes {batch}, {key.shape[:-3]}, {value.shape[:-3]} of q, k, v must be equal")
    mask = None if mask is None else jnp.asarray(mask) != 0
    rate = 0.0 if deterministic else dropout_rate
    if rate and dropout_rng is None:
        raise ValueError(f"dropout_rate={rate} with deterministic=False needs dropout_rng")
    overrides = {
        "force_fp32_for_softmax": force_fp32_for_softmax or None,
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    overrides = {name: x for name, x in overrides.items() if x is not None}
    reason = _why_flax(query.dtype, precision, module, overrides)
    if reason and options:
        raise NotImplementedError(f"{reason} needs Flax's own attention, which has no {next(iter(options))}=")
    if reason:
        dropout = {"broadcast_dropout": broadcast_dropout, "dropout_rng": dropout_rng, "dropout_rate": rate}
        arguments = {"precision": precision, "module": module, **dropout, **overrides}
        return _flax_attention(query, key, value, bias, mask, is_causal, arguments)
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    bias, mask = _four_axes(bias, batch), _four_axes(mask, batch)
    call = _Call(q, k, v, bias, mask, rate, dropout_rng if rate else None, **_flat(options))
    if is_causal:
        call = _causal_from_first_key(call)
    if q.shape[1] == 1:
        call = _at_last_visible_key(call)
    attend = _with_shared_dropout if rate and broadcast_dropout else _attend
    out = attend(call)
    return out.reshape(*batch, *out.shape[1:])


def make_attention_fn(
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
):
    """An `attention_fn` that also does what Flax has no argument for.

    `causal=True` replaces `nn.make_causal_mask` and its [B, 1, S, S] array. In Flax's decode (one query and a
    mask over the whole cache) the query stands at its last visible key, so `causal` and `window` hold there.

    Args:
        causal, window, softcap, segment_ids, alibi_slopes, sinks, scale, implementation: as for
            `jflash.flash_attention`, which counts positions from the last key. segment_ids may have Flax's
            batch axes, [batch..., S]; alibi_slopes and sinks are [H] or [batch..., H].

    Returns:
        `attention_fn` with these options and the same arguments. It raises NotImplementedError where it would
        leave the call to Flax, and where the position of a query is ambiguous.
    """
    options = {
        "causal": causal or None,
        "window": window,
        "softcap": softcap,
        "segment_ids": segment_ids,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "scale": scale,
        "implementation": implementation,
    }
    return functools.partial(attention_fn, options={name: x for name, x in options.items() if x is not None})


def _why_flax(dtype, precision, module, overrides: dict) -> str | None:
    """The argument that needs the weights as a matrix, or None."""
    if module is not None:
        return f"module={type(module).__name__}"
    for name in overrides:
        if name != "force_fp32_for_softmax":
            return f"{name}="
    # Products of 16-bit numbers are exact in float32, and float64 has but one precision.
    if dtype == jnp.float32 and not _is_ours(precision):
        return f"precision={precision} in float32"
    return None


def _is_ours(precision) -> bool:
    """Whether jflash's float32 products have this precision: the highest, unless the user set another for all."""
    if precision in (None, "default", lax.Precision.DEFAULT):
        return True
    return precision in ("highest", "float32", lax.Precision.HIGHEST) and no_matmul_precision_is_set()


def _flax_attention(query, key, value, bias, mask, is_causal: bool, arguments: dict) -> jax.Array:
    """Flax's own attention: of nnx where an nnx module sows, else of linen, which takes every override."""
    if is_causal:  # linen has no is_causal, and that of nnx takes no mask that broadcasts
        causal = jnp.tril(jnp.ones((query.shape[-3], key.shape[-3]), bool))
        mask = causal if mask is None else mask & causal
    group = query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(x, group, axis=-2) for x in (key, value))
    is_nnx = isinstance(arguments["module"], nnx.Module)
    attend = nnx.dot_product_attention if is_nnx else linen.dot_product_attention
    return attend(query, key, value, bias, mask, **arguments)


def _four_axes(x, batch: tuple[int, ...]):
    """A bias or mask that broadcasts to [batch..., H, Sq, Sk] -> [B|1, H|1, Sq|1, Sk|1]."""
    if x is None:
        return None
    x = jnp.asarray(x)
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if any(n != 1 for n in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with one batch axis, and segment_ids as a pair."""
    flat = dict(options)
    for name in ("alibi_slopes", "sinks"):
        if name in flat and jnp.ndim(flat[name]) > 1:
            flat[name] = _one_batch_axis(flat[name])
    if "segment_ids" in flat:
        ids = flat["segment_ids"]
        pair = ids if isinstance(ids, (tuple, list)) else (ids, ids)
        flat["segment_ids"] = tuple(map(_one_batch_axis, pair))
    return flat


def _one_batch_axis(x) -> jax.Array:
    x = jnp.asarray(x)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _causal_from_first_key(call: _Call) -> _Call:
    """Adds Flax's causal, j <= i, where that of jflash is aligned at the last key: j <= i + Sk - Sq."""
    Sq, Sk = call.q.shape[1], call.k.shape[1]
    if Sq == Sk:
        return call._replace(causal=True)
    from_last_key = {"causal": call.causal or None, "window": call.window, "alibi_slopes": call.alibi_slopes}
    for name, x in from_last_key.items():
        if x is not None:
            raise NotImplementedError(
                f"Sq={Sq} must equal Sk={Sk} to combine is_causal=True, which counts from the first key, "
                f"with {name}=, which counts from the last"
            )
    if Sq > Sk:
        return call._replace(window=(None, Sq - Sk))
    # No query sees a key past Sq - 1, and without those both alignments are one.
    bias, mask = (x if x is None or x.shape[-1] == 1 else x[..., :Sq] for x in (call.bias, call.mask))
    ids = call.segment_ids and (call.segment_ids[0], call.segment_ids[1][:, :Sq])
    k, v = call.k[:, :Sq], call.v[:, :Sq]
    return call._replace(k=k, v=v, bias=bias, mask=mask, segment_ids=ids, causal=True)


def _at_last_visible_key(call: _Call) -> _Call:
    """Moves a lone query's window into its mask: it stands at the mask's last key, not at the cache's."""
    mask = call.mask
    if mask is None or mask.shape[-1] == 1:
        return call
    if call.alibi_slopes is not None and call.sinks is not None:
        raise NotImplementedError("alibi_slopes= with sinks= needs the position of a lone masked query")
    left = None if call.window is None else call.window[0]
    if left not in (None, -1):
        j = jnp.arange(mask.shape[-1])
        last = jnp.where(mask, j, -1).max(axis=-1, keepdims=True)
        mask = mask & (j >= last - left)
    return call._replace(mask=mask, causal=False, window=None)


def _attend(call: _Call) -> Any:
    return flash_attention(**call._asdict())


def _with_shared_dropout(call: _Call) -> jax.Array:
    """One dropout mask for all: a vmap over batch entries and heads, each a call of its own with one key."""
    check_qkv(call.q, call.k, call.v)
    B, Sq, H, _ = call.q.shape
    group = H // call.k.shape[2]
    options = call._asdict()
    mapped: dict[str, Any] = {"q": _per_head(call.q, 2, B, H)}
    mapped["k"], mapped["v"] = (_per_head(jnp.repeat(x, group, axis=2), 2, B, H) for x in (call.k, call.v))
    for name in ("bias", "mask", "alibi_slopes", "sinks"):
        x = options[name]
        if x is None:
            continue
        x = jnp.atleast_2d(x)
        if x.shape[:2] != (1, 1):  # else it serves every head as it is, without a copy for each
            mapped[name] = _per_head(x, 1, B, H)
    if call.segment_ids is not None:
        mapped["segment_ids"] = tuple(jnp.repeat(x, H, axis=0)[:, None] for x in call.segment_ids)
    out: Any = jax.vmap(lambda x: flash_attention(**{**options, **x}))(mapped)
    return jnp.moveaxis(out.reshape(B, H, Sq, -1), 1, 2)


def _per_head(x: jax.Array, axis: int, B: int, H: int) -> jax.Array:
    """[B|1, ..., H|1, ...] with heads at `axis` -> [B H, 1, ..., 1, ...]."""
    x = jnp.moveaxis(x, axis, 1)
    x = jnp.broadcast_to(x, (B, H, *x.shape[2:])).reshape(B * H, 1, 1, *x.shape[2:])
    return jnp.moveaxis(x, 2, axis + 1)

"""From what a user passed to what a backend takes; every error names the value and the rule."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jflash import backends
from pallas_kernels.parts import dropout
from pallas_kernels.problem import AttentionArrays, AttentionProblem

DTYPES = ("bfloat16", "float16", "float32", "float64")
MAX_HEAD_DIM = 256


def bind(
    q,
    k,
    v,
    *,
    scale=None,
    causal=False,
    window=None,
    softcap=None,
    bias=None,
    mask=None,
    segment_ids=None,
    alibi_slopes=None,
    sinks=None,
    dropout_rate=0.0,
    dropout_key=None,
    deterministic=False,
    target=None,
) -> tuple[AttentionProblem, AttentionArrays]:
    """Checks the arguments of `flash_attention` and separates the static facts from the arrays."""
    q, k, v = array("q", q), array("k", k), array("v", v)
    check_qkv(q, k, v)
    B, Sq, H, D = q.shape
    _, Sk, Hk, Dv = v.shape
    left, right = _limits(flag("causal", causal), window, Sq, Sk)
    bias = None if bias is None else narrowed(_square("bias", bias, (B, H, Sq, Sk)), q.dtype)
    mask = None if mask is None else _square("mask", mask, (B, H, Sq, Sk))
    q_ids, kv_ids = _segments(segment_ids, B, Sq, Sk)
    rate = _dropout_rate(dropout_rate, dropout_key)
    problem = AttentionProblem(
        target=target or backends.target_of(q),
        dtype=q.dtype.name,
        B=B, H=H, Hk=Hk, Sq=Sq, Sk=Sk, D=D, Dv=Dv,
        scale=D**-0.5 if scale is None else number("scale", scale),
        left=left,
        right=right,
        softcap=_softcap(softcap),
        bias_shape=None if bias is None else bias.shape,
        bias_gradient=bias is not None,
        mask_shape=None if mask is None else mask.shape,
        segments=q_ids is not None,
        alibi=alibi_slopes is not None,
        sinks=sinks is not None,
        dropout_rate=rate,
        deterministic=flag("deterministic", deterministic),
    )  # fmt: skip
    return problem, AttentionArrays(
        q=q,
        k=k,
        v=v,
        bias=bias,
        mask=mask,
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        alibi_slopes=None if alibi_slopes is None else per_head("alibi_slopes", alibi_slopes, B, H),
        sinks=None if sinks is None else narrowed(per_head("sinks", sinks, B, H), q.dtype),
        dropout_seeds=_seeds(dropout_key, B) if rate else None,
    )


def array(name: str, x):
    """x as something with a shape and a dtype that JAX knows."""
    if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)):
        return x
    if isinstance(x, (np.ndarray, np.generic)):
        with jax.ensure_compile_time_eval():  # its values are known, also under jit
            return jnp.asarray(x)
    hint = "; for torch tensors use the functions of `interop`" if type(x).__module__ == "torch" else ""
    raise TypeError(f"{name} must be a jax or numpy array, got {type(x).__module__}.{type(x).__qualname__}{hint}")


def known(name: str, x) -> Any:
    """x as a numpy array where its values are known, also under jit; a tracer as it is."""
    x = x if isinstance(x, np.ndarray) else array(name, x)
    return x if isinstance(x, Tracer) else np.asarray(x)


def check_qkv(q, k, v) -> None:
    """Ranks, dtypes and shapes of [B, Sq, H, D], [B, Sk, Hk, D], [B, Sk, Hk, Dv]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}.shape={x.shape} must have 4 axes: [batch, seq, heads, dim]")
        if x.dtype.name not in DTYPES:
            raise TypeError(f"{name}.dtype={x.dtype.name} must be one of {', '.join(DTYPES)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v dtypes {q.dtype.name}, {k.dtype.name}, {v.dtype.name} must be equal")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k, v batch sizes {q.shape[0]}, {k.shape[0]}, {v.shape[0]} must be equal")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k.shape={k.shape} and v.shape={v.shape} must agree in seq and heads")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"head dims of q and k, {q.shape[3]} and {k.shape[3]}, must be equal")
    for name, dim in (("head_dim", q.shape[3]), ("value head_dim", v.shape[3])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}={dim} must be <= {MAX_HEAD_DIM} and >= 1")
    if min(q.shape[2], k.shape[2]) < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads={q.shape[2]} must be a multiple of key/value heads={k.shape[2]}")


def number(name: str, x) -> float:
    """A finite Python float known at trace time."""
    if isinstance(x, Tracer):
        hint = "; to learn it, multiply q by it" if name == "scale" else ""
        raise TypeError(f"{name} must be known at trace time, got {x.aval}{hint}")
    if isinstance(x, (jax.Array, np.ndarray)) and x.ndim == 0:
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}={x!r} must be a number")
    if not math.isfinite(x):
        raise ValueError(f"{name}={x} must be finite")
    return float(x)


def flag(name: str, x) -> bool:
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name}={x!r} must be True or False")
    return bool(x)


def _limits(causal: bool, window, Sq: int, Sk: int) -> tuple[int | None, int | None]:
    """(left, right), None where no query is limited: fewer cases to compile."""
    left = right = None
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window={window!r} must be a pair (left, right)")
        left, right = (_limit(side, x) for side, x in zip(("left", "right"), window, strict=True))
    if causal:
        right = 0
    if isinstance(Sk, int) and left is not None and left >= Sk - 1:  # else symbolic, of jax.export
        left = None
    if isinstance(Sq, int) and right is not None and right >= Sq - 1:
        right = None
    return left, right


def _limit(side: str, x) -> int | None:
    if x is None:
        return None
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        raise TypeError(f"window {side}={x!r} must be an integer or None")
    if x < -1:
        raise ValueError(f"window {side}={x} must be >= 0, or -1 or None for unbounded")
    return None if x == -1 else int(x)


def _softcap(x) -> float | None:
    if x is None:
        return None
    x = number("softcap", x)
    if x <= 0:
        raise ValueError(f"softcap={x} must be > 0, or None for no cap")
    return x


def _square(name: str, x, full: tuple[int, int, int, int]):
    """A bias or a mask, with four axes that broadcast to [B, H, Sq, Sk]."""
    x = array(name, x)
    if name == "mask" and x.dtype != bool:
        raise TypeError(f"mask.dtype={x.dtype.name} must be bool (True = visible); additive masks go to bias=")
    if name == "bias" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"bias.dtype={x.dtype.name} must be floating point; boolean masks go to mask=")
    if x.ndim == 2:
        x = reshaped(x, (1, 1, *x.shape))
    if x.ndim != 4:
        raise ValueError(f"{name}.shape={x.shape} must have 4 axes [B, H, Sq, Sk], or 2 axes [Sq, Sk]")
    if any(n not in (1, m) for n, m in zip(x.shape, full, strict=True)):
        raise ValueError(f"{name}.shape={x.shape} must broadcast to [B, H, Sq, Sk]={list(full)}")
    return x


def _segments(ids, B: int, Sq: int, Sk: int):
    if ids is None:
        return None, None
    pair = ids if isinstance(ids, (tuple, list)) else (ids, ids)
    if len(pair) != 2:
        raise TypeError(f"segment_ids must be one array or a pair (query, key), got {len(pair)} arrays")
    found = []
    for name, x, length in (("query", pair[0], Sq), ("key", pair[1], Sk)):
        x = array(f"{name} segment_ids", x)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name} segment_ids.dtype={x.dtype.name} must be an integer type")
        if x.shape != (B, length):
            raise ValueError(f"{name} segment_ids.shape={x.shape} must be [B, S]={[B, length]}")
        found.append(x if isinstance(x, jax.ShapeDtypeStruct) else x.astype(jnp.int32))
    return tuple(found)


def per_head(name: str, x, B: int, H: int):
    """[H] or [B, H] -> [1 or B, H]."""
    x = array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}.dtype={x.dtype.name} must be floating point")
    if x.shape not in ((H,), (B, H)):
        raise ValueError(f"{name}.shape={x.shape} must be [H]={[H]} or [B, H]={[B, H]}")
    return x if x.ndim == 2 else reshaped(x, (1, H))


def reshaped(x, shape: tuple[int, ...]):
    return jax.ShapeDtypeStruct(shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(shape)


def are_starts(values, tokens: int) -> bool:
    """Whether the known values of cu_seqlens start at 0, never fall, and end at `tokens` or before."""
    return bool(values[0] == 0 and (values[1:] >= values[:-1]).all() and values[-1] <= tokens)


def narrowed(x, dtype):
    """x in float32 if it is float64 beside inputs that are not: kernels know no float64, JAX widens the gradient."""
    if x.dtype != jnp.float64 or dtype == jnp.float64:
        return x
    return jax.ShapeDtypeStruct(x.shape, jnp.float32) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(jnp.float32)


def _dropout_rate(rate, key) -> float:
    rate = number("dropout_rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate={rate} must be in [0, 1)")
    if rate and key is None:
        raise ValueError(f"dropout_rate={rate} needs dropout_key")
    return rate


def _seeds(key, B: int):
    """Two words for each batch entry, [B, 2]."""
    if isinstance(key, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((B, 2), jnp.uint32)
    return dropout.batch_seeds(key, B)

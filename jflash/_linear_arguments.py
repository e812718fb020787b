"""From what a user passed to `linear_attention` to what a backend takes; every error names the value and the rule."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jflash import backends
from jflash._arguments import DTYPES, are_starts, array, flag, narrowed, number, reshaped
from pallas_kernels.problem import LinearArrays, LinearProblem


class LinearAttentionState(NamedTuple):
    """What a call leaves to the next one: the decayed sums over all tokens so far.

    kv: [N, H, D, Dv], the sum of k v^T, in float32 (float64 for float64 inputs). N is the batch size, or the
        number of packed sequences.
    z: [N, H, D], the sum of k, if normalizing; else None.
    """

    kv: jax.Array
    z: jax.Array | None = None


def bind(
    q,
    k,
    v,
    *,
    log_decay=None,
    mask=None,
    causal=None,
    scale=None,
    normalize=False,
    initial_state=None,
    return_state=False,
    cu_seqlens=None,
    reverse=False,
    chunk_size=None,
    target=None,
) -> tuple[LinearProblem, LinearArrays]:
    """Checks the arguments of `linear_attention` and separates the static facts from the arrays."""
    q, k, v = (array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    H = check_qkv(q, k, v, ("batch", "seq", "heads", "dim"))
    B, Sq, Hq, D = q.shape
    _, Sk, Hv, Dv = v.shape
    if k.shape[1] != Sk:
        raise ValueError(f"lengths of k and v, {k.shape[1]} and {Sk}, must be equal")
    causal = mask is None if causal is None else flag("causal", causal)
    normalize, return_state = flag("normalize", normalize), flag("return_state", return_state)
    reverse = flag("reverse", reverse)
    _check_combination(
        causal, Sq, Sk, log_decay=log_decay, mask=mask, initial_state=initial_state, return_state=return_state,
        cu_seqlens=cu_seqlens, reverse=reverse, chunk_size=chunk_size,
    )  # fmt: skip
    decay = None
    if log_decay is not None:
        log_decay = narrowed(log_decay_array(log_decay, {"[H]": (H,), "[B, S, H]": (B, Sq, H)}), q.dtype)
        decay, log_decay = ("token", log_decay) if log_decay.ndim == 3 else ("head", reshaped(log_decay, (1, 1, H)))
    if mask is not None:
        mask = narrowed(_mask(mask, (B, H, Sq, Sk)), q.dtype)
    if cu_seqlens is not None:
        cu_seqlens = _cu_seqlens(cu_seqlens, B, Sq)
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kv = z = None
    if initial_state is not None:
        kv, z = state_arrays(initial_state, (B if sequences is None else sequences, H, D, Dv), q.dtype, normalize)
    problem = LinearProblem(
        target=target or backends.target_of(q),
        dtype=q.dtype.name,
        B=B, H=H, Hq=Hq, Hk=k.shape[2], Hv=Hv, Sq=Sq, Sk=Sk, D=D, Dv=Dv,
        scale=D**-0.5 if scale is None else number("scale", scale),
        before=not causal or not reverse,
        after=not causal or reverse,
        decay=decay,
        decay_gradient=log_decay is not None,
        mask_shape=None if mask is None else mask.shape,
        mask_gradient=mask is not None and mask.dtype != bool,
        normalize=normalize,
        sequences=sequences,
        initial_state=kv is not None,
        final_state=return_state,
        chunk_size=_chunk_size(chunk_size),
    )  # fmt: skip
    return problem, LinearArrays(q, k, v, log_decay, mask, kv, z, cu_seqlens)


def check_qkv(q, k, v, axes: tuple[str, ...]) -> int:
    """Ranks, dtypes, heads and dims of q, k, v; returns the number of output heads."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != len(axes):
            raise ValueError(f"{name}.shape={x.shape} must have {len(axes)} axes: [{', '.join(axes)}]")
        if x.dtype.name not in DTYPES:
            raise TypeError(f"{name}.dtype={x.dtype.name} must be one of {', '.join(DTYPES)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v dtypes {q.dtype.name}, {k.dtype.name}, {v.dtype.name} must be equal")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k, v batch sizes {q.shape[0]}, {k.shape[0]}, {v.shape[0]} must be equal")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] < 1:
        raise ValueError(f"head dims of q and k, {q.shape[-1]} and {k.shape[-1]}, must be equal and >= 1")
    if v.shape[-1] < 1:
        raise ValueError(f"value head_dim={v.shape[-1]} must be >= 1")
    heads = [x.shape[-2] for x in (q, k, v)]
    H = max(heads)
    if min(heads) < 1 or any(H % n for n in heads):
        raise ValueError(f"heads of q, k, v, {heads}, must each divide the largest of them")
    return H


def state_arrays(state, shape: tuple[int, int, int, int], dtype, normalize: bool):
    """kv and z of a state that fits [N, H, D, Dv]."""
    if not isinstance(state, LinearAttentionState):
        raise TypeError(f"initial_state must be a LinearAttentionState, got {type(state).__qualname__}")
    if normalize == (state.z is None):
        raise ValueError(f"initial_state.z must be {'an array' if normalize else 'None'} with normalize={normalize}")
    wide = jnp.promote_types(dtype, jnp.float32)
    found = []
    for name, x, wanted in (("kv", state.kv, shape), ("z", state.z, shape[:3])):
        x = None if x is None else array(f"initial_state.{name}", x)
        if x is not None and x.shape != wanted:
            axes = ["N", "H", "D", "Dv"][: len(wanted)]
            raise ValueError(f"initial_state.{name}.shape={x.shape} must be [{', '.join(axes)}]={list(wanted)}")
        if x is not None and x.dtype != wide:
            raise TypeError(f"initial_state.{name}.dtype={x.dtype.name} must be {wide.name}")
        found.append(x)
    return found


def log_decay_array(x, shapes: dict[str, tuple[int, ...]]):
    """A log decay of one of the shapes, <= 0 if its values are known now; traced ones are the caller's word."""
    x = array("log_decay", x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"log_decay.dtype={x.dtype.name} must be floating point")
    if x.shape not in shapes.values():
        wanted = " or ".join(f"{axes}={list(shape)}" for axes, shape in shapes.items())
        raise ValueError(f"log_decay.shape={x.shape} must be {wanted}")
    if isinstance(x, (Tracer, jax.ShapeDtypeStruct)) or not x.is_fully_addressable:
        return x
    with jax.ensure_compile_time_eval():  # a known array may be closed over by a jit
        if (x > 0).any():
            raise ValueError(f"log_decay max={float(x.max()):.3g} must be <= 0, the log of a decay in [0, 1]")
    return x


def _check_combination(causal: bool, Sq: int, Sk: int, *, mask, **options) -> None:
    """Which arguments exclude one another."""
    given = [name for name, x in options.items() if x is not None and x is not False]
    if mask is not None:
        if causal:
            raise ValueError("causal=True with a mask must be one or the other: put the causal part into the mask")
        if given:
            raise ValueError(f"{given[0]} with a mask must be None: a mask has neither decay, state nor direction")
        return
    only_causal = [name for name in given if name in ("initial_state", "return_state", "reverse")]
    if not causal and only_causal:
        raise ValueError(f"{only_causal[0]} needs causal=True: without it there is no last token")
    if not causal and given == ["chunk_size"]:
        raise ValueError("chunk_size needs causal=True, log_decay or cu_seqlens: this call is not cut into chunks")
    if Sq != Sk and (causal or given):
        what = "causal=True" if causal else given[0]
        raise ValueError(f"lengths of q and k, {Sq} and {Sk}, must be equal with {what}")


def _mask(x, full: tuple[int, int, int, int]):
    x = array("mask", x)
    if x.dtype != bool and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"mask.dtype={x.dtype.name} must be bool or floating point: integers have no gradient")
    if x.ndim != 4 or any(n not in (1, m) for n, m in zip(x.shape, full, strict=True)):
        raise ValueError(f"mask.shape={x.shape} must be [B|1, H|1, Sq|1, Sk|1] for [B, H, Sq, Sk]={list(full)}")
    return x


def _cu_seqlens(x, B: int, S: int):
    x = array("cu_seqlens", x)
    if B != 1:
        raise ValueError(f"batch={B} must be 1 with cu_seqlens: pack the sequences along the seq axis")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"cu_seqlens.dtype={x.dtype.name} must be an integer type")
    if x.ndim != 1 or x.shape[0] < 2:
        raise ValueError(f"cu_seqlens.shape={x.shape} must be [N + 1] for N >= 1 sequences")
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    if not isinstance(x, Tracer):
        values = np.asarray(x)
        if not are_starts(values, S):
            raise ValueError(f"cu_seqlens={values.tolist()} must start at 0, never fall, and end at {S} or before")
    return x.astype(jnp.int32)


def _chunk_size(x) -> int | None:
    if x is None:
        return None
    if isinstance(x, bool) or not isinstance(x, int) or x < 16 or x & (x - 1):
        raise ValueError(f"chunk_size={x!r} must be a power of two >= 16, or None")
    return x

"""From what a user passed to L1 attention to what a backend takes; every error names the value and the rule."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jflash import _arguments
from jflash._arguments import are_starts, array, flag, number
from pallas_kernels.problem import AttentionArrays, L1Problem

KINDS = ("neg", "reciprocal")
WEIGHTS = ("softmax", "exp", "tanh1")
COMPUTES = ("auto", "f32")


def bind(
    q,
    k,
    v,
    *,
    scale=None,
    kind="neg",
    eps=1e-3,
    weight="softmax",
    sink=None,
    causal=False,
    window=None,
    mask=None,
    bias=None,
    exclude_diagonal=False,
    segment_ids=None,
    cu_seqlens=None,
    center=False,
    compute="auto",
    target=None,
) -> tuple[L1Problem, AttentionArrays]:
    """Checks the arguments of `l1_attention` and separates the static facts from the arrays."""
    q, k, v = array("q", q), array("k", k), array("v", v)
    _arguments.check_qkv(q, k, v)
    D = q.shape[3]
    center, exclude_diagonal = flag("center", center), flag("exclude_diagonal", exclude_diagonal)
    scale = check_scores(D, scale, kind, eps, center)
    one_of("weight", weight, WEIGHTS)
    one_of("compute", compute, COMPUTES)
    if sink is not None:
        sink = check_sink(sink, weight, q.shape[2])
    if cu_seqlens is not None:
        if segment_ids is not None:
            raise ValueError("cu_seqlens and segment_ids both say what belongs together: pass one of them")
        aligned = causal or window is not None or exclude_diagonal
        segment_ids = q_ids, k_ids = _packed(cu_seqlens, q.shape[0], q.shape[1], k.shape[1], aligned)
        q, k, v = (zero_outside(x, ids) for x, ids in ((q, q_ids), (k, k_ids), (v, k_ids)))
    problem, arrays = _arguments.bind(
        q, k, v, scale=scale, causal=causal, window=window, bias=bias, mask=mask, segment_ids=segment_ids,
        sinks=sink, target=target,
    )  # fmt: skip
    return L1Problem(
        **vars(problem), kind=kind, eps=float(eps) if kind == "reciprocal" else 0.0, weight=weight,
        center=center, exclude_diagonal=exclude_diagonal, compute=compute,
    ), arrays  # fmt: skip


def check_scores(D: int, scale, kind, eps, center) -> float:
    """The scale, where the formula of the scores is a possible one."""
    one_of("kind", kind, KINDS)
    scale = D**-0.5 if scale is None else number("scale", scale)
    eps = number("eps", eps)
    if kind == "reciprocal":
        if eps <= 0:
            raise ValueError(f"eps={eps} must be > 0 with kind='reciprocal'")
        if scale < 0:
            raise ValueError(f"scale={scale} must be >= 0 with kind='reciprocal'")
        if center:
            raise ValueError("center=True needs kind='neg': a centered distance may be negative")
    return scale


def check_sink(sink, weight: str, H: int):
    """A sink [H] or [B, H], from that or from one number for all heads."""
    if weight != "softmax":
        raise ValueError(f"sink={sink} needs weight='softmax': weight={weight!r} has no denominator")
    if isinstance(sink, numbers.Real):
        return jnp.full((H,), number("sink", sink))
    sink = array("sink", sink)
    return jnp.broadcast_to(sink, (H,)) if sink.ndim == 0 else sink


def one_of(name: str, x, choices: tuple[str, ...]) -> None:
    if x not in choices:
        raise ValueError(f"{name}={x!r} must be one of {', '.join(map(repr, choices))}")


def check_values_back(p: L1Problem, a: AttentionArrays, vb):
    """The values that go from queries to keys, where there are as many of both."""
    vb = array("vb", vb)
    if p.Sq != p.Sk:
        raise ValueError(f"query length={p.Sq} must equal key length={p.Sk} to go both ways")
    if vb.shape != a.v.shape or vb.dtype != a.v.dtype:
        expected = f"{a.v.dtype.name}{list(a.v.shape)}"
        raise ValueError(f"vb {vb.dtype.name}{list(vb.shape)} must be {expected}, as the other values")
    return vb


def check_pairs(listed, Sq: int, Sk: int) -> tuple[jax.Array, jax.Array]:
    """(dst, src) [E] from pairs [E, 2], each of which is in range and there once, if that can be seen."""
    pairs: jax.Array = array("pairs", listed)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not jnp.issubdtype(pairs.dtype, jnp.integer):
        raise ValueError(f"pairs {pairs.dtype.name}{list(pairs.shape)} must be integers [E, 2] of (query, key)")
    if not isinstance(pairs, Tracer):
        found = np.asarray(pairs, np.int64)
        wrong = ((found < 0) | (found >= (Sq, Sk))).any(axis=1)
        if wrong.any():
            n = int(wrong.argmax())
            raise ValueError(f"pairs[{n}]={found[n].tolist()} must be in range({Sq}) and range({Sk})")
        _, first, counts = np.unique(found, axis=0, return_index=True, return_counts=True)
        if (counts > 1).any():
            n = int(first[counts > 1][0])
            raise ValueError(f"pairs[{n}]={found[n].tolist()} must be there once, not {counts.max()} times")
    return pairs[:, 0], pairs[:, 1]


def _packed(cu_seqlens, B: int, Sq: int, Sk: int, aligned: bool):
    """Segment ids of queries and keys from the borders of sequences packed in one row."""
    if B != 1:
        raise ValueError(f"cu_seqlens needs batch=1, sequences packed in one row, got batch={B}")
    pair = cu_seqlens if isinstance(cu_seqlens, (tuple, list)) else (cu_seqlens, cu_seqlens)
    if len(pair) != 2:
        raise TypeError(f"cu_seqlens must be one array or a pair (query, key), got {len(pair)} arrays")
    if aligned and pair[0] is not pair[1]:
        raise ValueError("causal, window and exclude_diagonal need one cu_seqlens for queries and keys")
    q_cu, k_cu = (_borders(x, n) for x, n in zip(pair, (Sq, Sk), strict=True))
    if q_cu.shape != k_cu.shape:
        raise ValueError(f"cu_seqlens of queries and keys, {q_cu.shape} and {k_cu.shape}, must be equally long")
    return _ids(q_cu, Sq, -1), _ids(k_cu, Sk, -2)


def _borders(x, length: int):
    x = array("cu_seqlens", x)
    if x.ndim != 1 or x.size < 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"cu_seqlens {x.dtype.name}{list(x.shape)} must be integers [sequences + 1]")
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        found = np.asarray(x)
        if not are_starts(found, length):
            raise ValueError(f"cu_seqlens={found.tolist()} must ascend from 0 to at most {length} tokens")
    return x


def _ids(cu_seqlens, length: int, outside: int):
    """Which sequence each token is of, int32 [1, length]; `outside` after the last one."""
    if isinstance(cu_seqlens, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((1, length), jnp.int32)
    t = jnp.arange(length)
    ids = jnp.searchsorted(cu_seqlens, t, side="right", method="scan_unrolled") - 1
    return jnp.where(t < cu_seqlens[-1], ids, outside)[None]


def zero_outside(x, ids):
    """x [1, S, ...] with zeros after the last sequence, where anything may lie."""
    if isinstance(x, jax.ShapeDtypeStruct) or isinstance(ids, jax.ShapeDtypeStruct):
        return x
    return jnp.where((ids >= 0)[:, :, None, None], x, 0)

"""Softmax attention over packed sequences: no padding, one call for sequences of any lengths."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jflash import _key_ranges, backends
from jflash._arguments import array, bind, flag, per_head
from jflash._op import attend
from jflash._transforms import by_standard_rules
from pallas_kernels.problem import AttentionProblem


@by_standard_rules
def flash_attention_varlen(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Any:
    """`flash_attention` of each sequence with itself: `out = dropout(softmax(softcap(scale q k^T) + bias + alibi)) v`.

    Sequence n is the queries `cu_seqlens_q[n]` to `cu_seqlens_q[n + 1]` and the keys likewise. Its queries stand
    at the end of its keys. A length may be 0. Shapes are static and lengths may be traced: one compilation
    serves them all. What no sequence can see is skipped, forward and backward.

    Args:
        q: [Tq, H, D], all sequences one after another; k: [Tk, Hk, D]; v: [Tk, Hk, Dv]. Tokens at
            `cu_seqlens[-1]` and after are not read, and such queries give 0.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [N + 1], rising from 0: the sum of the lengths before each
            sequence, then of all.
        max_seqlen_q, max_seqlen_k: checked against the lengths where these are known, and not needed.
        bias, mask: as for `flash_attention` with B = 1: [1, H|1, Tq|1, Tk|1] or [Tq, Tk], of packed positions.
        segment_ids: [T], or a pair [Tq] and [Tk]; a query sees only keys of its own sequence and segment.
        alibi_slopes: [H] or [N, H]; distances are within the sequence.
        sinks: [H].
        dropout_rate, dropout_key: the mask depends on the packed positions.
        The rest as for `flash_attention`.

    Returns:
        out [Tq, H, Dv] in q's dtype, or (out, lse) with lse [H, Tq].

    Raises:
        ValueError, TypeError: an argument breaks a rule; the values of cu_seqlens are checked outside of jit only.
        NotImplementedError: `implementation` cannot take the call; the message says why.

    Source: the semantics of flash_attn 2's `flash_attn_varlen_func`; Dao, FlashAttention-2 (arXiv 2307.08691).
    """
    q, k, v = (_batch_of_one(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    cu_seqlens_q = _key_ranges.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[1], max_seqlen_q)
    cu_seqlens_k = _key_ranges.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[1], max_seqlen_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        shapes = f"{cu_seqlens_q.shape} and {cu_seqlens_k.shape}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k shapes {shapes} must be equal: one sequence for each")
    problem, arrays = bind(
        q, k, v, scale=scale, causal=causal, window=window, softcap=softcap, bias=bias, mask=mask,
        segment_ids=jax.tree.map(_batch_of_one_ids, segment_ids), sinks=sinks,
        dropout_rate=dropout_rate, dropout_key=dropout_key, deterministic=deterministic,
    )  # fmt: skip
    ranges, sequence = _key_ranges.packed(problem, cu_seqlens_q, cu_seqlens_k)
    if alibi_slopes is not None:
        alibi_slopes = jnp.asarray(per_head("alibi_slopes", alibi_slopes, cu_seqlens_q.shape[0] - 1, problem.H))
        if alibi_slopes.shape[0] != 1:
            alibi_slopes = jnp.moveaxis(alibi_slopes[sequence], 0, 1)[None]
    problem = dataclasses.replace(problem, left=None, right=None, key_ranges=True, alibi=alibi_slopes is not None)
    chosen = backends.choose(problem, implementation)
    arrays = arrays._replace(
        key_ranges=ranges, alibi_slopes=alibi_slopes, row_ends=_row_ends(problem, cu_seqlens_q, cu_seqlens_k)
    )
    backend = "reference" if problem.empty else chosen
    out, lse = attend(problem, backend, arrays)
    return (out[0], lse[0]) if flag("return_lse", return_lse) else out[0]


def _batch_of_one_ids(x) -> jax.Array:
    return jnp.asarray(array("segment_ids", x))[None]


def _row_ends(p: AttentionProblem, cu_seqlens_q, cu_seqlens_k) -> jax.Array | None:
    """Where the last sequence ends, int32 [1, 2], or None where that is known to be at the last token."""
    ends = cu_seqlens_q[-1], cu_seqlens_k[-1]
    if not any(isinstance(end, Tracer) for end in ends) and ends == (p.Sq, p.Sk):
        return None
    return jnp.where(jnp.arange(2) == 0, *ends)[None]  # as a stack it would be a kernel of its own


def _batch_of_one(name: str, x) -> jax.Array:
    """[T, heads, dim] -> [1, T, heads, dim]."""
    x = jnp.asarray(array(name, x))
    if x.ndim != 3:
        raise ValueError(f"{name}.shape={x.shape} must have 3 axes: [tokens, heads, dim]")
    return x[None]

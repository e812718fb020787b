"""Attention whose scores are L1 distances of queries and keys: dense, both ways, and over listed pairs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp

from jflash import backends
from jflash._l1_arguments import bind, check_pairs, check_values_back, one_of, zero_outside
from jflash._op import attend
from jflash.l1_reference import scores_of_distances
from jflash.xla import l1_sparse
from jflash.xla.l1_pairwise import pairwise
from pallas_kernels.problem import AttentionArrays, L1Problem

__all__ = ["explain", "l1_attention", "l1_attention_bidi", "l1_attention_sparse", "l1_scores", "why_not"]

Kind = Literal["neg", "reciprocal"]
Weight = Literal["softmax", "exp", "tanh1"]
Segments = jax.Array | tuple[jax.Array, jax.Array]


class Options(TypedDict, total=False):
    """The arguments of `l1_attention` that say what it computes."""

    scale: float | None
    kind: Kind
    eps: float
    weight: Weight
    sink: float | jax.Array | None
    causal: bool
    window: tuple[int | None, int | None] | None
    mask: jax.Array | None
    bias: jax.Array | None
    exclude_diagonal: bool
    segment_ids: Segments | None
    cu_seqlens: Segments | None
    center: bool
    compute: Literal["auto", "f32"]


@overload
def l1_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    return_lse: Literal[False] = False,
    implementation: str | None = None,
    **options: Unpack[Options],
) -> jax.Array: ...
@overload
def l1_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    return_lse: Literal[True],
    implementation: str | None = None,
    **options: Unpack[Options],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def l1_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    return_lse: bool,
    implementation: str | None = None,
    **options: Unpack[Options],
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
def l1_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    kind: Kind = "neg",
    eps: float = 1e-3,
    weight: Weight = "softmax",
    sink: float | jax.Array | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    exclude_diagonal: bool = False,
    segment_ids: Segments | None = None,
    cu_seqlens: Segments | None = None,
    center: bool = False,
    return_lse: bool = False,
    compute: Literal["auto", "f32"] = "auto",
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """L1 attention in O(N) memory: `out = softmax(-scale d) v` with `d_ij = sum_w |q_iw - k_jw|`.

    Where a feature of q and of k are equal, neither gets a gradient from it: sign(0) = 0. Queries stand at the
    end of the keys: query i is at key position `i + Sk - Sq`. A query that sees no key gives 0, an lse of -inf
    and no gradient.

    Args:
        q: [B, Sq, H, D] in float32, bfloat16 or float16 (float64 under `jax_enable_x64`). D <= 256.
        k: [B, Sk, Hk, D], same dtype. H is a multiple of Hk; query head h reads head `h // (H / Hk)`.
        v: [B, Sk, Hk, Dv], same dtype. Dv <= 256, and may differ from D.
        scale: multiplies the distance; a number known at trace time. Default D**-0.5.
        kind: the score of a distance. "neg": `-scale d`. "reciprocal": `1 / (eps + scale d)`.
        eps: > 0, of the reciprocal; a score is at most `1 / eps`. "neg" has none.
        weight: "softmax"; "exp": weights `exp(score)`, without a denominator; "tanh1": `1 + tanh(score)`.
        sink: one more logit for every row, with value 0: `exp(sink)` joins the denominator (and lse). A number,
            or [H] or [B, H]. Default: none. 0 adds 1. Differentiable. Softmax only.
        causal: keys after the query's position are hidden. Combines with `window`.
        window: (left, right): keys from `left` before to `right` after the query's position are seen, both
            ends included. None or -1 on a side leaves it open.
        mask: bool, True = visible, [B|1, H|1, Sq|1, Sk|1] or [Sq, Sk].
        bias: added to the scores, of the same shapes as mask, floating point. Differentiable.
        exclude_diagonal: the key at the query's own position is hidden.
        segment_ids: integers [B, S], or a pair for queries [B, Sq] and keys [B, Sk]; a query sees only keys
            of its own segment. They are compared as int32.
        cu_seqlens: integers [N + 1], from 0 and never falling, or a pair for queries and keys: with B = 1,
            sequence n is the tokens from cu_seqlens[n] up to, not with, cu_seqlens[n + 1]. What lies after the
            last sequence is not read, and its out is 0. Causal, window and exclude_diagonal want one for both.
        center: the distance is less `(sum_w |q_iw| + sum_w |k_jw|) / sqrt(2)`. kind="neg" only.
        return_lse: also return the natural log of the softmax denominator. Differentiable. Softmax only.
        compute: how |q - k| is found. "auto": by the backend's fastest exact way. "f32": subtracted in float32.
        implementation: None takes the fastest backend that can do the call in both directions; a name
            ("hopper", "xla", "reference") insists on it. See `jflash.l1.explain`.

    Returns:
        out [B, Sq, H, Dv] in q's dtype, or (out, lse) with lse [B, H, Sq] in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names both.
        NotImplementedError: `implementation` cannot take the call; the message says why.

    Source: github.com/tlh24/l1-attention: "neg" is its formula since April 2024, "reciprocal" its older one,
    there without scale in the README. "tanh1" is from Attentive Neural Processes (arXiv 1901.05761).
    """
    problem, arrays = bind(
        q, k, v, scale=scale, kind=kind, eps=eps, weight=weight, sink=sink, causal=causal, window=window,
        mask=mask, bias=bias, exclude_diagonal=exclude_diagonal, segment_ids=segment_ids,
        cu_seqlens=cu_seqlens, center=center, compute=compute,
    )  # fmt: skip
    if return_lse and weight != "softmax":
        raise ValueError(f"return_lse needs weight='softmax': weight={weight!r} has no denominator")
    out, lse = _attend(problem, arrays, implementation)
    return (out, lse) if return_lse else out


def l1_attention_bidi(
    q: jax.Array,
    k: jax.Array,
    vf: jax.Array,
    vb: jax.Array,
    *,
    implementation: str | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    """L1 attention that reads and writes with the same weights: `out = P vf + P^T vb`.

    With P the weights of `l1_attention(q, k, vf, ...)`, token i gets `sum_j P_ij vf_j + sum_j P_ji vb_j`.
    O(N) memory; costs two calls of `l1_attention`.

    Args:
        q: [B, S, H, D]. k: [B, S, Hk, D]. vf: [B, S, Hk, Dv]. vb: [B, S, Hk, Dv]. As for `l1_attention`, with as
            many queries as keys.
        implementation, options: as for `l1_attention`.

    Returns:
        out [B, S, H, Dv] in q's dtype.

    Raises:
        ValueError, TypeError, NotImplementedError: as `l1_attention`.

    Source: `L1AttnSparseBidi` of github.com/tlh24/l1-attention.
    """
    problem, arrays = bind(q, k, vf, **options)
    vb = check_values_back(problem, arrays, vb)
    if options.get("cu_seqlens") is not None:
        vb = zero_outside(vb, arrays.q_segment_ids)
    forth, lse = _attend(problem, arrays, implementation)
    back, _ = _attend(*_turned_round(problem, arrays, lse, vb), implementation)
    return forth + back


def l1_attention_sparse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pairs: jax.Array,
    *,
    scale: float | None = None,
    kind: Kind = "neg",
    eps: float = 1e-3,
    weight: Weight = "softmax",
    sink: float | jax.Array | None = 0.0,
    center: bool = False,
    vb: jax.Array | None = None,
) -> jax.Array:
    """L1 attention over listed pairs of tokens: `out_t = sum of P_ts v_s over the pairs (t, s)`.

    `P_ts = exp(score_ts) / (exp(sink) + sum of exp(score_tu) over the pairs (t, u))`. With all pairs and no
    sink it is `l1_attention`. The order of the pairs does not matter; a token without a pair gets 0. Time and
    memory grow with the number of pairs times heads, whatever the lengths. Plain JAX: every derivative works.

    Args:
        q: [B, Sq, H, D]. k: [B, Sk, Hk, D]. v: [B, Sk, Hk, Dv]. As for `l1_attention`.
        pairs: integers [E, 2] of (query, key), that is (destination, source), no pair twice; the same for all
            of the batch and all heads.
        scale, kind, eps, weight, center: as for `l1_attention`.
        sink: as for `l1_attention`, but 0 by default with a softmax. None: no sink.
        vb: [B, S, Hk, Dv] values that go the other way: adds `sum of P_ts vb_t over the pairs (t, s)` to out_s.
            With as many queries as keys.

    Returns:
        out [B, Sq, H, Dv] in q's dtype.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names both. Pairs that are traced
            are not looked at: then one out of range adds nothing, and one that is there twice counts twice.

    Source: `L1AttnSparse` and `L1AttnSparseBidi` of github.com/tlh24/l1-attention, whose denominator starts at 1.
    """
    if weight != "softmax" and isinstance(sink, float) and sink == 0:
        sink = None  # the default
    problem, arrays = bind(q, k, v, scale=scale, kind=kind, eps=eps, weight=weight, sink=sink, center=center)
    dst, src = check_pairs(pairs, problem.Sq, problem.Sk)
    if vb is not None:
        vb = check_values_back(problem, arrays, vb)
    return l1_sparse.attend(problem, arrays, vb, dst, src)


def l1_scores(
    q: jax.Array,
    k: jax.Array,
    *,
    scale: float | None = None,
    kind: Kind = "neg",
    eps: float = 1e-3,
    center: bool = False,
    layout: Literal["bhts", "bsth", "bhst"] = "bhts",
) -> jax.Array:
    """The scores alone, `-scale d` or `1 / (eps + scale d)`, with `d_ts = sum_w |q_tw - k_sw|`.

    O(Sq Sk) memory, as the result; nothing is spread over features, forward or backward.

    Args:
        q: [B, Sq, H, D]. k: [B, Sk, Hk, D]. As for `l1_attention`.
        scale, kind, eps, center: as for `l1_attention`.
        layout: the axes of the result, where t counts queries and s keys. "bhts": [B, H, Sq, Sk]. "bsth":
            [B, Sk, Sq, H], the seed's since April 2024. "bhst": [B, H, Sk, Sq], the seed's before.

    Returns:
        scores in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names both.

    Source: `L1Attn` of github.com/tlh24/l1-attention.
    """
    one_of("layout", layout, tuple(_LAYOUTS))
    problem, arrays = bind(q, k, k, scale=scale, kind=kind, eps=eps, center=center)
    return jnp.transpose(_scores(problem, arrays), _LAYOUTS[layout])


def why_not(
    q, k, v, *, implementation: str, direction="forward", target: str | None = None, return_lse=False, **options
) -> str | None:
    """Why a backend cannot take a call of `l1_attention` in a direction, or None if it can.

    Arguments as for `jflash.why_not`, with the options of `l1_attention`.
    """
    problem, _ = bind(q, k, v, target=target, **options)
    if direction not in backends.DIRECTIONS:
        raise ValueError(f"direction={direction!r} must be one of {backends.DIRECTIONS}")
    return backends.get(implementation, backends.L1).why_not(problem, direction)


def explain(q, k, v, *, target: str | None = None, return_lse=False, **options) -> str:
    """One line for each backend and direction: used, free to use, or why not. Arguments as for `why_not`."""
    problem, _ = bind(q, k, v, target=target, **options)
    return backends.explain(problem, backends.L1)


_LAYOUTS = {"bhts": (0, 1, 2, 3), "bsth": (0, 3, 2, 1), "bhst": (0, 1, 3, 2)}


def _attend(problem: L1Problem, arrays: AttentionArrays, implementation: str | None):
    chosen = backends.choose(problem, implementation, backends.L1)
    return attend(problem, "reference" if problem.empty else chosen, arrays)


def _turned_round(p: L1Problem, a: AttentionArrays, lse: jax.Array, vb: jax.Array):
    """The call that computes `P^T vb`: keys ask, queries answer, with weights `exp(s_ji - lse_j)`."""
    bias = None if a.bias is None else jnp.swapaxes(a.bias, 2, 3)
    mask = None if a.mask is None else jnp.swapaxes(a.mask, 2, 3)
    weight = p.weight
    if weight == "softmax":
        weight = "exp"
        less = jnp.where(lse == -jnp.inf, 0, -lse)[:, :, None]  # a row that sees nothing is hidden anyway
        bias = less if bias is None else bias + less
    problem = dataclasses.replace(
        p, Hk=p.H, left=p.right, right=p.left, weight=weight, sinks=False, bias_gradient=bias is not None,
        bias_shape=None if bias is None else bias.shape, mask_shape=None if mask is None else mask.shape,
    )  # fmt: skip
    k, vb = (jnp.repeat(x, p.group, axis=2) for x in (a.k, vb))
    ids = {"q_segment_ids": a.kv_segment_ids, "kv_segment_ids": a.q_segment_ids}
    return problem, AttentionArrays(q=k, k=a.q, v=vb, bias=bias, mask=mask, **ids)


@functools.partial(jax.jit, static_argnums=0)
def _scores(p: L1Problem, a: AttentionArrays) -> jax.Array:
    """[B, H, Sq, Sk]."""
    if 0 in (p.B, p.Sq, p.Sk):
        return jnp.zeros((p.B, p.H, p.Sq, p.Sk), jnp.promote_types(a.q.dtype, jnp.float32))
    q, k = jnp.moveaxis(a.q, 1, 2), jnp.moveaxis(a.k, 1, 2)
    d = pairwise(q.reshape(p.B * p.Hk, p.group * p.Sq, p.D), k.reshape(p.B * p.Hk, p.Sk, p.D))
    d = d.reshape(p.B, p.H, p.Sq, p.Sk)
    return scores_of_distances(p, d, q[:, :, :, None], jnp.repeat(k, p.group, axis=1)[:, :, None])

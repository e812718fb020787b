"""Softmax attention over dense batches: the function, and why it runs where it runs."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import jax

from jflash import backends
from jflash._arguments import bind, flag
from jflash._op import attend


class _Options(TypedDict, total=False):
    """The arguments of `flash_attention` that leave its type alone."""

    scale: float | None
    causal: bool
    window: tuple[int | None, int | None] | None
    softcap: float | None
    bias: jax.Array | None
    mask: jax.Array | None
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None
    alibi_slopes: jax.Array | None
    sinks: jax.Array | None
    dropout_rate: float
    dropout_key: jax.Array | None
    deterministic: bool
    implementation: str | None


@overload
def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> jax.Array: ...
@overload
def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[jax.Array, jax.Array]: ...
@overload
def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_lse: bool, **options: Unpack[_Options]
) -> jax.Array | tuple[jax.Array, jax.Array]: ...
def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
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
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention in O(N) memory: `out = dropout(softmax(softcap(scale q k^T) + bias + alibi)) v`.

    Queries stand at the end of the keys: query i is at key position `i + Sk - Sq`. A query that sees no
    key gives 0, an lse of -inf and no gradient.

    Args:
        q: [B, Sq, H, D] in float32, bfloat16 or float16 (float64 under `jax_enable_x64`). D <= 256.
        k: [B, Sk, Hk, D], same dtype. H is a multiple of Hk; query head h reads head `h // (H / Hk)`.
        v: [B, Sk, Hk, Dv], same dtype. Dv <= 256, and may differ from D.
        scale: multiplies `q k^T`; a number known at trace time. Default D**-0.5.
        causal: keys after the query's position are hidden. Combines with `window`.
        window: (left, right): keys from `left` before to `right` after the query's position are seen, both
            ends included. None or -1 on a side leaves it open.
        softcap: scores become `softcap * tanh(scores / softcap)`, before bias and masks.
        bias: added to the scores, [B|1, H|1, Sq|1, Sk|1] or [Sq, Sk], floating point. Differentiable. Hide keys by
            -inf or mask: the gradients of a row whose scores are all near -1e9 are too large, by up to its number of
            keys, for they start from an lse that is rounded to float32.
        mask: bool, True = visible, of the same shapes as bias.
        segment_ids: integers [B, S], or a pair for queries [B, Sq] and keys [B, Sk]; a query sees only keys
            of its own segment. They are compared as int32.
        alibi_slopes: [H] or [B, H]; adds `-slope * |i + Sk - Sq - j|`. No gradient: differentiating raises.
        sinks: [H] or [B, H]; one more logit for every row, with value 0: `exp(sink)` joins the denominator
            (and lse). Differentiable.
        dropout_rate: probability of dropping a weight, in [0, 1); what is kept is scaled by 1 / (1 - rate).
            The mask depends only on the key, the batch entry, the head, and the two positions.
        dropout_key: a `jax.random` key, needed if dropout_rate > 0.
        return_lse: also return the natural log of the softmax denominator. Differentiable.
        deterministic: the backward gives the same bits every run.
        implementation: None takes the fastest backend that can do the call in both directions; a name
            ("hopper", "cudnn", "xla", "reference") insists on it. See `explain`.

    Returns:
        out [B, Sq, H, Dv] in q's dtype, or (out, lse) with lse [B, H, Sq] in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names both.
        NotImplementedError: `implementation` cannot take the call; the message says why.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691); Shah et al., FlashAttention-3 (arXiv 2407.08608). The
    semantics of causal, window, softcap and alibi_slopes are those of flash_attn 2.
    """
    problem, arrays = bind(
        q, k, v, scale=scale, causal=causal, window=window, softcap=softcap, bias=bias, mask=mask,
        segment_ids=segment_ids, alibi_slopes=alibi_slopes, sinks=sinks, dropout_rate=dropout_rate,
        dropout_key=dropout_key, deterministic=deterministic,
    )  # fmt: skip
    chosen = backends.choose(problem, implementation)
    out, lse = attend(problem, "reference" if problem.empty else chosen, arrays)
    return (out, lse) if flag("return_lse", return_lse) else out


def why_not(
    q, k, v, *, implementation: str, direction="forward", target: str | None = None, return_lse=False, **options
) -> str | None:
    """Why a backend cannot take a call in a direction, or None if it can.

    Args:
        q, k, v, return_lse, options: as for `flash_attention`; `jax.ShapeDtypeStruct`s will do.
        implementation: the backend's name. direction: "forward" or "backward".
        target: where it would run: "cpu", or a compute capability such as "sm_90". Default: where it is.
    """
    problem, _ = bind(q, k, v, target=target, **options)
    if direction not in backends.DIRECTIONS:
        raise ValueError(f"direction={direction!r} must be one of {backends.DIRECTIONS}")
    return backends.get(implementation).why_not(problem, direction)


def explain(q, k, v, *, target: str | None = None, return_lse=False, **options) -> str:
    """One line for each backend and direction: used, free to use, or why not. Arguments as for `why_not`."""
    problem, _ = bind(q, k, v, target=target, **options)
    return backends.explain(problem)

"""Linear attention: with any mask in tiles, or causal with decay in O(N), and one token at a time."""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp

from jflash import backends
from jflash._arguments import array, flag, number
from jflash._linear_arguments import LinearAttentionState, bind, check_qkv, log_decay_array, state_arrays
from jflash._linear_op import attend

__all__ = ["LinearAttentionState", "explain", "linear_attention", "linear_attention_step", "why_not"]


class Options(TypedDict, total=False):
    """The arguments of `linear_attention` that leave its type alone."""

    log_decay: jax.Array | None
    mask: jax.Array | None
    causal: bool | None
    scale: float | None
    normalize: bool
    initial_state: LinearAttentionState | None
    cu_seqlens: jax.Array | None
    reverse: bool
    chunk_size: int | None
    implementation: str | None


@overload
def linear_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_state: Literal[False] = False, **options: Unpack[Options]
) -> jax.Array: ...
@overload
def linear_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_state: Literal[True], **options: Unpack[Options]
) -> tuple[jax.Array, LinearAttentionState]: ...
@overload
def linear_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, return_state: bool, **options: Unpack[Options]
) -> jax.Array | tuple[jax.Array, LinearAttentionState]: ...
def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    mask: jax.Array | None = None,
    causal: bool | None = None,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    cu_seqlens: jax.Array | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, LinearAttentionState]:
    """Attention without a softmax: `out_i = scale sum_j (q_i . k_j) M_ij v_j`.

    Without a mask M_ij is the decay from token j to token i, `exp(sum of log_decay[s] over j < s <= i)`, and
    0 for j > i. That is the recurrence `S_i = exp(log_decay[i]) S_(i-1) + k_i v_i^T`, `out_i = scale q_i S_i`,
    computed chunk by chunk in O(N) time and memory. With a mask M is the mask, in tiles: O(N^2) time, and
    nothing of Sq x Sk in memory but the mask and its gradient.

    Args:
        q: [B, Sq, Hq, D] in float32, bfloat16 or float16 (float64 under `jax_enable_x64`).
        k: [B, Sk, Hk, D], same dtype.
        v: [B, Sk, Hv, Dv], same dtype. With H the largest of Hq, Hk and Hv, each divides H, and output head h
            reads heads `h // (H / Hq)`, `h // (H / Hk)` and `h // (H / Hv)`.
        log_decay: [H], or [B, S, H] for each token, floating point and <= 0; -inf forgets all that was
            before. Default: no decay. Differentiable.
        mask: [B|1, H|1, Sq|1, Sk|1], bool or floating point; multiplies the weights. Differentiable if
            floating. Not with causal, log_decay, a state, cu_seqlens, reverse or chunk_size.
        causal: a query sees the keys up to its own, and Sq = Sk. False: it sees all keys; with a decay, which
            then acts both ways, out is that of the causal call plus that of the reverse call, with the
            diagonal once. Default: True without a mask.
        scale: multiplies the weights; a number known at trace time. Default D**-0.5.
        normalize: divide by the sum of the weights (scale cancels); 0 where it is 0. Wants positive features,
            such as `jflash.feature_maps.elu_plus_one`.
        initial_state: the `LinearAttentionState` before the first token. Differentiable. Causal calls only.
        return_state: also return the state after the last token. Differentiable. Causal calls only.
        cu_seqlens: integers [N + 1], from 0 and never falling: with B = 1, sequence n is the tokens from
            cu_seqlens[n] up to, not with, cu_seqlens[n + 1]. States are one for each sequence. Tokens after
            the last sequence are not read; their out is 0.
        reverse: time runs backwards: a query sees its own key and the later ones, decayed by the sum of
            log_decay[s] over i <= s < j. The initial state is behind the last token.
        chunk_size: tokens a chunk, a power of two >= 16. Default: the backend's choice.
        implementation: None takes the fastest backend that can do the call in both directions; a name
            ("hopper", "xla", "reference") insists on it. See `jflash.linear.explain`.

    Returns:
        out [B, Sq, H, Dv] in q's dtype, or (out, state).

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names both. A log_decay > 0 is
            found only outside of jit.
        NotImplementedError: `implementation` cannot take the call; the message says why.

    Source: Katharopoulos et al., Transformers are RNNs (arXiv 2006.16236); Sun et al., RetNet (arXiv
    2307.08621); Qin et al., Lightning Attention-2 (arXiv 2401.04658); Dao and Gu, Mamba-2 (arXiv 2405.21060).
    """
    problem, arrays = bind(
        q, k, v, log_decay=log_decay, mask=mask, causal=causal, scale=scale, normalize=normalize,
        initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens, reverse=reverse,
        chunk_size=chunk_size,
    )  # fmt: skip
    chosen = backends.choose(problem, implementation, backends.LINEAR)
    results = attend(problem, "reference" if problem.empty else chosen, arrays)
    if not return_state:
        return results.out
    assert results.kv is not None
    return results.out, LinearAttentionState(results.kv, results.z)


def linear_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    state: LinearAttentionState,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    normalize: bool = False,
) -> tuple[jax.Array, LinearAttentionState]:
    """One token of causal `linear_attention`: `S' = exp(log_decay) S + k v^T`, `out = scale q S'`.

    Args:
        q: [B, Hq, D], k: [B, Hk, D], v: [B, Hv, Dv]: one token, dtypes and heads as there.
        state: what the tokens before left, from `linear_attention(..., return_state=True)` or a step.
        log_decay: [H] or [B, H], <= 0. scale, normalize: as there.

    Returns:
        out [B, H, Dv] in q's dtype, and the state with this token. Differentiable by autodiff, any order.

    Raises: as `linear_attention`.
    """
    q, k, v = (array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    H = check_qkv(q, k, v, ("batch", "heads", "dim"))
    B, _, D = q.shape
    kv, z = state_arrays(state, (B, H, D, v.shape[-1]), q.dtype, flag("normalize", normalize))
    scale = D**-0.5 if scale is None else number("scale", scale)
    decay = jnp.ones((), kv.dtype)
    if log_decay is not None:
        log_decay = log_decay_array(log_decay, {"[H]": (H,), "[B, H]": (B, H)})
        decay = jnp.exp(log_decay.astype(kv.dtype))[..., None]
    wide = [jnp.repeat(x.astype(kv.dtype), H // x.shape[1], axis=1) for x in (q, k, v)]
    kv = decay[..., None] * kv + wide[1][..., :, None] * wide[2][..., None, :]
    out = scale * (wide[0][..., None] * kv).sum(axis=-2)
    if z is not None:
        z = decay * z + wide[1]
        norm = scale * (wide[0] * z).sum(axis=-1, keepdims=True)
        out = jnp.where(norm == 0, 0, out / jnp.where(norm == 0, 1, norm))
    return out.astype(q.dtype), LinearAttentionState(kv, z)


def why_not(q, k, v, *, implementation: str, direction="forward", target: str | None = None, **options) -> str | None:
    """Why a backend cannot take a call of `linear_attention` in a direction, or None if it can.

    Arguments as for `jflash.why_not`, with the options of `linear_attention`.
    """
    problem, _ = bind(q, k, v, target=target, **options)
    if direction not in backends.DIRECTIONS:
        raise ValueError(f"direction={direction!r} must be one of {backends.DIRECTIONS}")
    return backends.get(implementation, backends.LINEAR).why_not(problem, direction)


def explain(q, k, v, *, target: str | None = None, **options) -> str:
    """One line for each backend and direction: used, free to use, or why not. Arguments as for `why_not`."""
    problem, _ = bind(q, k, v, target=target, **options)
    return backends.explain(problem, backends.LINEAR)

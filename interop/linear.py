"""Linear attention for torch: `jflash.linear_attention`, and the names of its seed and of flash-linear-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from interop import _arguments
from interop.attention import autocast
from interop.linear_ops import Operands, Options, attend

State = tuple[Tensor, Tensor | None]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool | None = None,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, State]:
    """`jflash.linear_attention` of torch tensors: `out_i = scale sum_j (q_i . k_j) M_ij v_j`.

    M is the decay from token j to token i, 0 for j > i, in O(N) time and memory; or any mask, in tiles.

    Args:
        q: [B, Sq, Hq, D] in float32, bfloat16, float16 or float64, on CUDA or CPU; under torch.autocast, q, k
            and v are cast to its dtype.
        k: [B, Sk, Hk, D], v: [B, Sk, Hv, Dv], same dtype. Heads: as in `jflash.linear_attention`.
        log_decay: [H] or [B, S, H], <= 0. Differentiable.
        mask: [B|1, H|1, Sq|1, Sk|1], bool or floating point. Differentiable if floating.
        initial_state: (kv [N, H, D, Dv], z [N, H, D] or None without normalize) in float32. Differentiable.
        cu_seqlens: integers [N + 1], with B = 1.
        causal, scale, normalize, return_state, reverse, chunk_size: as in `jflash.linear_attention`.

    Returns:
        out [B, Sq, H, Dv] in q's dtype, or (out, (kv, z)).

    Raises:
        ValueError, TypeError: an argument breaks a rule; the message names both. A log_decay > 0 and wrong
            cu_seqlens are found on the CPU only: elsewhere to look would be to wait.
        RuntimeError: a second derivative, or JAX has no backend for the tensors' device.

    Source: as of `jflash.linear_attention`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _arguments.check_axes(name, x, "[batch, seq, heads, dim]")
    q, k, v = autocast(q, k, v)
    kv, z = (None, None) if initial_state is None else initial_state
    if cu_seqlens is not None:
        cu_seqlens = _arguments.cu_seqlens("cu_seqlens", cu_seqlens, q.flatten(0, 1), None).int()
    operands = Operands(q, k, v, log_decay, mask, kv, z, cu_seqlens)
    for name, x in operands._asdict().items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}.device={x.device} must be {q.device}, as of q")
    causal = mask is None if causal is None else bool(causal)
    _check(operands, causal, return_state)
    options = Options(causal, scale, bool(normalize), bool(return_state), bool(reverse), chunk_size)
    out, kv, z = attend(operands, options)
    if not return_state:
        return out
    assert kv is not None
    return out, (kv, z)


def _check(x: Operands, causal: bool, return_state: bool) -> None:
    """What JAX would not see: values, and what is wanted of the results."""
    if return_state and (not causal or x.mask is not None):
        raise ValueError("return_state needs causal=True and no mask: without a last token there is no state")
    if x.log_decay is not None and _arguments.values_are_known(x.log_decay) and bool((x.log_decay > 0).any()):
        raise ValueError(f"log_decay max={x.log_decay.max().item():.3g} must be <= 0, the log of a decay in [0, 1]")


def flash_linear_attention(Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None = None) -> Tensor:
    """`((Q K^T) * M) V` in tiles, or `Q (K^T V)` without M; no scale, not causal but by M.

    Args:
        Q: [B, H, Lq, C], K: [B, H|1, Lk, C], V: [B, H|1, Lk, Cv].
        M: [B|1, H|1, Lq|1, Lk|1], floating point (differentiable), bool or integer.

    Returns: [B, H, Lq, Cv]. No matrix of Lq x Lk is stored but M and, in M's shape, its gradient.

    Source: the signature of flash-linear-attention-pytorch, whose own gradient of a broadcast M misses a
    slice of the sum on CPU; here it is the derivative of the formula.
    """
    for name, x in (("Q", Q), ("K", K), ("V", V)):
        _arguments.check_axes(name, x, "[batch, heads, seq, dim]")
    if M is not None and not M.is_floating_point() and M.dtype != torch.bool:
        M = M.to(Q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (Q, K, V))
    out = linear_attention(q, k, v, mask=M, causal=False, scale=1.0)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def normal_linear_attention(Q: Tensor, K: Tensor, V: Tensor, M: Tensor | None = None) -> Tensor:
    """`flash_linear_attention` written out in torch, with the weights in memory: what it is compared with."""
    return Q @ (K.mT @ V) if M is None else ((Q @ K.mT) * M) @ V


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    reverse: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with a scalar gate a head, `S_t = exp(g_t) S_(t-1) + k_t v_t^T`, `o_t = scale q_t S_t`.

    Args:
        q, k: [B, T, H, K]. v: [B, T, H, V]; more heads of v or of q and fewer of the others: as in
            `linear_attention`.
        g: [B, T, H], a log decay for each token, or g_gamma: [H], one for all; at most one. Both have gradients.
        initial_state: [N, H, K, V] in float32, differentiable; states are [N, H, V, K] with state_v_first.
        cu_seqlens: integers [N + 1], with B = 1.

    Returns: o [B, T, H, V] in q's dtype, and the final state in float32, or None unless output_final_state.

    Source: the signature of flash-linear-attention's function; Yang et al., arXiv 2312.06635.
    """
    if g is not None and g_gamma is not None:
        raise ValueError("g with g_gamma must be one or the other: log decays of each token, or of each head")
    turn = (lambda x: x.mT) if state_v_first else (lambda x: x)
    state = None if initial_state is None else (turn(initial_state), None)
    found = linear_attention(
        q, k, v, log_decay=g_gamma if g is None else g, scale=scale, initial_state=state, return_state=True,
        cu_seqlens=cu_seqlens, reverse=reverse, chunk_size=chunk_size,
    )  # fmt: skip
    assert isinstance(found, tuple)
    out, (kv, _) = found
    return out, turn(kv) if output_final_state else None


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` under the name and in the argument order of the token-by-token form: the same numbers."""
    states = initial_state, output_final_state, state_v_first
    return chunk_simple_gla(q, k, v, g, g_gamma, scale, *states, cu_seqlens, reverse=reverse)

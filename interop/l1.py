"""L1 attention for torch: `jflash.l1_attention` and its kin, with autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from interop import _arguments
from interop.attention import autocast
from interop.l1_ops import Operands, Options, attend

LAYOUTS = ("bhts", "bsth", "bhst")
Pair = Tensor | tuple[Tensor, Tensor]


def l1_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kind: str = "neg",
    eps: float = 1e-3,
    weight: str = "softmax",
    sink: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    exclude_diagonal: bool = False,
    segment_ids: Pair | None = None,
    cu_seqlens: Pair | None = None,
    center: bool = False,
    return_lse: bool = False,
    compute: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`jflash.l1_attention` of torch tensors: `out = softmax(-scale d) v` with `d_ij = sum_w |q_iw - k_jw|`.

    Args:
        q: [B, Sq, H, D] in float32, bfloat16, float16 or float64, on CUDA or CPU; under torch.autocast, q, k
            and v are cast to its dtype.
        k: [B, Sk, Hk, D], v: [B, Sk, Hk, Dv], same dtype. H is a multiple of Hk.
        sink: a number, or [H] or [B, H]. Differentiable. Softmax only.
        mask: bool, True = visible, or bias: floating point, differentiable; both broadcast to [B, H, Sq, Sk].
        segment_ids: integers [B, S], or a pair for queries and keys. cu_seqlens: integers [N + 1], or a pair;
            their values are checked on the CPU only: elsewhere to look would be to wait.
        The rest as in `jflash.l1_attention`.

    Returns:
        out [B, Sq, H, Dv] in q's dtype, or (out, lse) with lse [B, H, Sq] in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument breaks a rule; the message names both.
        NotImplementedError: a second derivative.
        RuntimeError: JAX has no backend for the tensors' device.

    Source: as of `jflash.l1_attention`.
    """
    q, k, v = _checked(q, k, v)
    left, right = (-1, -1) if window is None else _arguments.window(tuple(-1 if x is None else x for x in window))
    options = Options(
        "attention", scale=scale, kind=kind, eps=eps, weight=weight, center=center, left=left,
        right=0 if causal else right, exclude_diagonal=exclude_diagonal, compute=compute,
    )  # fmt: skip
    if return_lse and weight != "softmax":
        raise ValueError(f"return_lse needs weight='softmax': weight={weight!r} has no denominator")
    q_ids, kv_ids, q_cu, k_cu = None, None, None, None
    if segment_ids is not None:
        q_ids, kv_ids = _arguments.segments(_pair(segment_ids), q, k)
    if cu_seqlens is not None:
        q_cu, k_cu = _packed(cu_seqlens, q, k)
    operands = Operands(
        q, k, v, bias=None if bias is None else _arguments.square("bias", bias, q, k), sink=_sink(sink, weight, q, k),
        mask=None if mask is None else _mask(mask, q, k), q_segment_ids=q_ids, kv_segment_ids=kv_ids,
        cu_seqlens_q=q_cu, cu_seqlens_k=k_cu,
    )  # fmt: skip
    out, lse = attend(operands, options)
    return (out, lse) if return_lse else out


def l1_attention_bidi(q: Tensor, k: Tensor, vf: Tensor, vb: Tensor, **options) -> Tensor:
    """`jflash.l1_attention_bidi` of torch tensors: `P vf + P^T vb` with the weights P of `l1_attention(q, k, vf)`.

    Args:
        q: [B, S, H, D]. k: [B, S, Hk, D]. vf, vb: [B, S, Hk, Dv].
        options: as for `l1_attention`, without return_lse.

    Returns: out [B, S, H, Dv] in q's dtype.
    """
    _check_back(q, k, vf, vb)
    found = l1_attention(q, k, vf, **options, return_lse=options.get("weight", "softmax") == "softmax")
    forth, lse = found if isinstance(found, tuple) else (found, None)
    k, vb = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, vb))
    back = l1_attention(k, q, vb, **_turned_round(options, lse))
    assert isinstance(back, Tensor)
    return forth + back


def l1_attention_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Tensor,
    *,
    scale: float | None = None,
    kind: str = "neg",
    eps: float = 1e-3,
    weight: str = "softmax",
    sink: float | Tensor | None = 0.0,
    center: bool = False,
    vb: Tensor | None = None,
) -> Tensor:
    """`jflash.l1_attention_sparse` of torch tensors: `out_t = sum of P_ts v_s over the listed pairs (t, s)`.

    Args:
        q: [B, Sq, H, D]. k: [B, Sk, Hk, D]. v: [B, Sk, Hk, Dv]. vb: [B, S, Hk, Dv], values that go the other way.
        pairs: integers [E, 2] of (query, key), no pair twice; values are checked on the CPU only.
        The rest as in `jflash.l1_attention_sparse`: the sink is 0 by default, as the seed's.

    Returns: out [B, Sq, H, Dv] in q's dtype.
    """
    q, k, v = _checked(q, k, v)
    options = Options("sparse", scale=scale, kind=kind, eps=eps, weight=weight, center=center)
    if weight != "softmax" and isinstance(sink, float) and sink == 0:
        sink = None  # the default
    if vb is not None:
        _check_back(q, k, v, vb)
        (vb,) = autocast(vb)
    operands = Operands(q, k, v, vb, sink=_sink(sink, weight, q, k), pairs=_checked_pairs(pairs, q, k))
    out, _ = attend(operands, options)
    return out


def l1_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    kind: str = "neg",
    eps: float = 1e-3,
    center: bool = False,
    layout: str = "bhts",
) -> Tensor:
    """`jflash.l1_scores` of torch tensors: `-scale d` or `1 / (eps + scale d)`, in float32 or wider.

    Args:
        q: [B, Sq, H, D]. k: [B, Sk, Hk, D].
        layout: the axes of the result, t for queries and s for keys: "bhts", "bsth" or "bhst".
        The rest as in `l1_attention`.
    """
    q, k, _ = _checked(q, k, k)
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(map(repr, LAYOUTS))}")
    options = Options("scores", scale=scale, kind=kind, eps=eps, center=center, layout=layout)
    out, _ = attend(Operands(q, k), options)
    return out


def _checked(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """q, k and v in the dtype of autocast, of shapes and dtypes that fit. JAX checks the options."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _arguments.check_axes(name, x, "[batch, seq, heads, dim]")
    found = list(autocast(q, k, v))
    _arguments.check_qkv(*found)
    return found


def _sink(sink: float | Tensor | None, weight: str, q: Tensor, k: Tensor) -> Tensor | None:
    """[H] or [B, H], from that or from one number for all heads."""
    if sink is None:
        return None
    if weight != "softmax":
        raise ValueError(f"sink={sink} needs weight='softmax': weight={weight!r} has no denominator")
    if not isinstance(sink, Tensor):
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.full(q.shape[2:3], _arguments.number("sink", sink), dtype=wide, device=q.device)
    sink = sink if sink.dim() else sink.expand(q.shape[2])
    _arguments.sinks(sink, q, k)
    return sink


def _mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    mask = _arguments.square("mask", mask, q, k)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask.dtype={mask.dtype} must be torch.bool (True = visible); additive masks go to bias=")
    return mask


def _packed(cu_seqlens: Pair, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """The borders of packed queries, and of keys if they have their own."""
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs batch=1, sequences packed in one row, got batch={q.shape[0]}")
    of_q, of_k = pair = _pair(cu_seqlens)
    of_q, of_k = (
        _arguments.cu_seqlens("cu_seqlens", x, like[0], None).int() for x, like in zip(pair, (q, k), strict=True)
    )
    return of_q, None if pair[0] is pair[1] else of_k


def _pair(x: Pair) -> tuple[Tensor, Tensor]:
    """(of queries, of keys)."""
    if not isinstance(x, (tuple, list)):
        return x, x
    if len(x) != 2:
        raise TypeError(f"a pair (query, key) or one tensor is wanted, got {len(x)} tensors")
    return x[0], x[1]


def _check_back(q: Tensor, k: Tensor, vf: Tensor, vb: Tensor) -> None:
    """The values vb that go from queries to keys, where there are as many of both."""
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"query length={q.shape[1]} must equal key length={k.shape[1]} to go both ways")
    if vb.shape != vf.shape or vb.dtype != vf.dtype or vb.device != vf.device:
        expected = f"{vf.dtype} {list(vf.shape)} on {vf.device}"
        raise ValueError(f"vb {vb.dtype} {list(vb.shape)} on {vb.device} must be {expected}, as the other values")


def _turned_round(options: dict, lse: Tensor | None) -> dict:
    """The options of the call that computes `P^T vb`: keys ask, queries answer, with weights `exp(s_ji - lse_j)`."""
    turned = {**options, "sink": None}
    left, right = options.get("window") or (-1, -1)
    turned |= {"causal": False, "window": (0 if options.get("causal") else right, left)}
    for name in ("segment_ids", "cu_seqlens"):
        if options.get(name) is not None:
            turned[name] = _pair(options[name])[::-1]
    for name in ("mask", "bias"):
        if options.get(name) is not None:
            turned[name] = options[name].transpose(-1, -2)
    if lse is not None:
        less = torch.where(lse == -torch.inf, 0, -lse)[:, :, None]  # a row that sees nothing is hidden anyway
        bias = turned.get("bias")
        turned |= {"weight": "exp", "bias": less if bias is None else bias + less}
    return turned


def _checked_pairs(pairs: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """int32 [E, 2], in range and each there once, if that can be seen without waiting."""
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.is_floating_point() or pairs.dtype == torch.bool:
        raise ValueError(f"pairs {pairs.dtype} {list(pairs.shape)} must be integers [E, 2] of (query, key)")
    if pairs.device != q.device:
        raise ValueError(f"pairs.device={pairs.device} must be {q.device}, as of the queries")
    if _arguments.values_are_known(pairs):
        check_pairs(pairs, q.shape[1], k.shape[1])
    return pairs.int()


def check_pairs(pairs: Tensor, Sq: int, Sk: int) -> None:
    """Raises for a pair out of range(Sq) and range(Sk), and for one that is there twice."""
    wrong = ((pairs < 0) | (pairs >= pairs.new_tensor([Sq, Sk]))).any(1)
    if wrong.any():
        n = int(wrong.int().argmax())
        raise ValueError(f"pairs[{n}]={pairs[n].tolist()} must be in range({Sq}) and range({Sk})")
    unique, counts = torch.unique(pairs, dim=0, return_counts=True)
    if len(unique) < len(pairs):
        twice = unique[counts.argmax()].tolist()
        raise ValueError(f"the pair {twice} must be there once, not {int(counts.max())} times")

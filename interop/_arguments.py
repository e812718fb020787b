"""What users may pass; every error names the value and the rule. Nothing here waits for a GPU."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from interop.operands import Options

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Dtypes, shapes and devices of [B, Sq, H, D], [B, Sk, Hk, D], [B, Sk, Hk, Dv]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}.dtype={x.dtype} must be one of {', '.join(map(str, _DTYPES))}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v dtypes {q.dtype}, {k.dtype}, {v.dtype} must be equal")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k, v batch sizes {q.shape[0]}, {k.shape[0]}, {v.shape[0]} must be equal")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise ValueError(f"(seq, heads) of k and v, {_list(k)[1:3]} and {_list(v)[1:3]}, must be equal")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"head dims of q and k, {q.shape[3]} and {k.shape[3]}, must be equal")
    for name, dim in (("head_dim", q.shape[3]), ("value head_dim", v.shape[3])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}={dim} must be <= {MAX_HEAD_DIM} and >= 1")
    H, Hk = q.shape[2], k.shape[2]
    if H < 1 or Hk < 1 or H % Hk:
        raise ValueError(f"query heads={H} must be a multiple of key/value heads={Hk}")
    for name, x in (("k", k), ("v", v)):
        _check_device(name, x, q)


def check_axes(name: str, x: Tensor, axes: str) -> None:
    """x is a tensor with as many axes as `axes` lists."""
    _check_tensor(name, x)
    if x.dim() != axes.count(",") + 1:
        raise ValueError(f"{name}.shape={_list(x)} must have {axes.count(',') + 1} axes: {axes}")


def unpack(name: str, x: Tensor, lead: str, parts: int) -> tuple[Tensor, ...]:
    """The slices of x [lead, parts, heads, dim]."""
    axes = f"[{lead}, {parts}, heads, dim]"
    check_axes(name, x, axes)
    if x.shape[-3] != parts:
        raise ValueError(f"{name}.shape={_list(x)} must be {axes}")
    return x.unbind(-3)


def check_integers(name: str, x: Tensor) -> None:
    """x is a tensor of int32 or int64."""
    _check_tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}.dtype={x.dtype} must be torch.int32 or torch.int64")


def _check_tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}")


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}.device={x.device} must be {q.device}, as of the queries")


def slopes(x: Tensor, q: Tensor, of_queries: bool = False) -> Tensor:
    """alibi_slopes [H] or [B, H] -> [1, H] or [B, H]; of_queries they may be [B, H, Sq], and stay so."""
    _check_tensor("alibi_slopes", x)
    B, Sq, H, _ = q.shape
    x = x if of_queries and _list(x) == [B, H, Sq] else _per_head("alibi_slopes", x, q)
    if x.dtype != torch.float32:
        raise TypeError(f"alibi_slopes.dtype={x.dtype} must be torch.float32")
    if x.requires_grad:
        raise NotImplementedError("alibi_slopes has no gradient: detach it, or pass the bias as attn_mask")
    return x


def sinks(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """sinks [H] or [B, H] -> [1, H] or [B, H]."""
    x = _per_head("sinks", x, q)
    if x.dtype not in (torch.float32, q.dtype):
        raise TypeError(f"sinks.dtype={x.dtype} must be torch.float32 or the inputs' {q.dtype}")
    if k.shape[1] == 0:
        raise ValueError(f"k.shape={_list(k)} must have a key where there are sinks")
    return x


def _per_head(name: str, x: Tensor, q: Tensor) -> Tensor:
    _check_tensor(name, x)
    B, _, H, _ = q.shape
    if _list(x) not in ([H], [B, H]):
        raise ValueError(f"{name}.shape={_list(x)} must be [H]={[H]} or [B, H]={[B, H]}")
    _check_device(name, x, q)
    return x.reshape(-1, H)


def segments(pair: tuple[Tensor, Tensor], q: Tensor, k: Tensor) -> list[Tensor]:
    """Integers [B, Sq] and [B, Sk] -> int32."""
    found = []
    for name, x, like in (("query", pair[0], q), ("key", pair[1], k)):
        _check_tensor(f"{name} segment_ids", x)
        if x.is_floating_point() or x.is_complex():
            raise TypeError(f"{name} segment_ids.dtype={x.dtype} must be an integer type")
        if x.shape != like.shape[:2]:
            raise ValueError(f"{name} segment_ids.shape={_list(x)} must be [B, S]={_list(like)[:2]}")
        _check_device(f"{name} segment_ids", x, q)
        found.append(x.to(torch.int32))
    return found


def square(name: str, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A mask or a bias that broadcasts to [B, H, Sq, Sk], with four axes. A mask that was expanded is not any more."""
    _check_tensor(name, x)
    full = [q.shape[0], q.shape[2], q.shape[1], k.shape[1]]
    if x.dtype not in (torch.bool, torch.float32, q.dtype):
        raise TypeError(f"{name}.dtype={x.dtype} must be torch.bool, torch.float32 or the inputs' {q.dtype}")
    lead = 4 - x.dim()
    if lead < 0 or any(n not in (1, m) for n, m in zip(x.shape, full[lead:], strict=True)):
        raise ValueError(f"{name}.shape={_list(x)} must broadcast to [B, H, Sq, Sk]={full}")
    _check_device(name, x, q)
    x = x.reshape([1] * lead + _list(x))
    for axis, step in enumerate(x.stride()):
        if x.dtype == torch.bool and step == 0 and x.shape[axis] > 1:
            x = x.narrow(axis, 0, 1)
    return x


def cu_seqlens(name: str, x: Tensor, like: Tensor, longest: int | Tensor | None) -> Tensor:
    """[N + 1] integers, rising from 0 to the tokens of `like` [T, ...] or less. Read where that waits for no GPU."""
    check_integers(name, x)
    if x.dim() != 1 or x.shape[0] < 1:
        raise ValueError(f"{name}.shape={_list(x)} must be [N + 1] for N sequences")
    _check_device(name, x, like)
    if isinstance(longest, Tensor):
        longest = int(longest) if values_are_known(longest) else None
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, numbers.Integral)):
        raise TypeError(f"max_seqlen={longest!r} of {name} must be an integer")
    if values_are_known(x):
        lengths, tokens = x.diff(), like.shape[0]
        if x[0] != 0 or (lengths < 0).any() or x[-1] > tokens:
            raise ValueError(f"{name}={x.tolist()} must start at 0, never fall, and end at {tokens} or before")
        if longest is not None and lengths.numel() and longest < lengths.max():
            raise ValueError(
                f"max_seqlen={longest} must be >= {int(lengths.max())}, the longest of {name}={x.tolist()}"
            )
    return x


def values_are_known(x: Tensor) -> bool:
    """Whether x can be read now, without waiting for a GPU and without tracing."""
    plain = not isinstance(x, FakeTensor) and not torch._C._are_functorch_transforms_active()
    return x.device.type == "cpu" and plain and not torch.compiler.is_compiling()


def number(name: str, x) -> float:
    """A finite Python float."""
    if type(x) is not float and (isinstance(x, bool) or not isinstance(x, numbers.Real)):  # `type` is fast
        raise TypeError(f"{name}={x!r} must be a number")
    x = float(x)
    if not -math.inf < x < math.inf:  # torch.compile cannot trace math.isfinite of a dynamic number
        raise ValueError(f"{name}={x} must be finite")
    return x


def softcap(x) -> float:
    x = number("softcap", x)
    if x < 0:
        raise ValueError(f"softcap={x} must be > 0, or 0 for no cap")
    return x


def dropout_p(x) -> float:
    x = number("dropout_p", x)
    if not 0 <= x < 1:
        raise ValueError(f"dropout_p={x} must be in [0, 1)")
    return x


def window(x) -> tuple[int, int]:
    """window_size as (left, right), -1 for an open side."""
    if type(x) is tuple and x == (-1, -1):
        return -1, -1
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(f"window_size={x!r} must be a pair (left, right)")
    return _side("left", x[0]), _side("right", x[1])


def options(scale, causal, window_size, cap, dropout, deterministic) -> Options:
    """The static arguments that the functions of flash_attn share."""
    left, right = window(window_size)
    scale = None if scale is None else number("softmax_scale", scale)
    return Options(scale, left, 0 if causal else right, softcap(cap), dropout_p(dropout), bool(deterministic))


def _side(name: str, x) -> int:
    if type(x) is not int and (isinstance(x, bool) or not isinstance(x, numbers.Integral)):
        raise TypeError(f"window_size {name}={x!r} must be an integer")
    if x < -1:
        raise ValueError(f"window_size {name}={x} must be >= 0, or -1 for unbounded")
    return int(x)


def _list(x: Tensor) -> list[int]:
    return list(x.shape)

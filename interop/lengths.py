"""Lengths rounded up, so that few programs serve them all.

XLA compiles a program for fixed shapes, and a new one takes seconds. So the first lengths of a kind of call run
as they are, and any others are padded to powers of two. The backend learns at run time how much is there: it
computes nothing for the rest, and no position, mask or dropout moves. Only the order of sums may differ.
"""

from __future__ import annotations

import os
from collections.abc import Hashable

import torch
from torch import Tensor

from interop.operands import Operands, Options

_SMALLEST = 64
first: dict[Hashable, tuple[int, int, int]] = {}  # lengths of queries and keys, packed sequences


def room(direction: str, x: Operands, options: Options) -> tuple[int, int] | None:
    """(Sq, Sk) to pad a call to, or None to run it as it is, as always under JFLASH_EXACT_LENGTHS=1."""
    if os.environ.get("JFLASH_EXACT_LENGTHS") == "1":
        return None
    (B, Sq, H, D), (_, Sk, Hk, Dv) = x.q.shape, x.v.shape
    exact = Sq, Sk, _sequences(x)
    rounded = _rounded(Sq), _rounded(Sk), _power_of_two(_sequences(x))
    others = tuple(None if t is None else tuple(n == 1 for n in t.shape) for t in x[3:])
    kind = (direction, x.q.device, x.q.dtype, B, H, Hk, D, Dv, others, options)
    return None if exact in (rounded, first.setdefault(kind, exact)) else rounded[:2]


def _rounded(n: int) -> int:
    """A lone query or key stays alone."""
    return n if n <= 1 else max(_SMALLEST, _power_of_two(n))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length() if n else 0


def _sequences(x: Operands) -> int:
    return 0 if x.cu_seqlens is None else x.cu_seqlens.shape[2] - 1


def pad_operands(x: Operands, Sq: int, Sk: int) -> Operands:
    return x._replace(
        q=pad(x.q, 1, Sq),
        k=pad(x.k, 1, Sk),
        v=pad(x.v, 1, Sk),
        bias=_pad_square(x.bias, Sq, Sk),
        mask=_pad_square(x.mask, Sq, Sk),
        q_segment_ids=None if x.q_segment_ids is None else pad(x.q_segment_ids, 1, Sq),
        alibi_slopes=_pad_slopes(x.alibi_slopes, Sq),
        cu_seqlens=_pad_sequences(x.cu_seqlens, _power_of_two(_sequences(x))),
        kv_segment_ids=None if x.kv_segment_ids is None else pad(x.kv_segment_ids, 1, Sk),
    )


def _pad_square(x: Tensor | None, Sq: int, Sk: int) -> Tensor | None:
    """[..., Sq|1, Sk|1] padded where it does not broadcast."""
    if x is None:
        return None
    for axis, size in ((2, Sq), (3, Sk)):
        x = x if x.shape[axis] == 1 else pad(x, axis, size)
    return x


def _pad_slopes(x: Tensor | None, Sq: int) -> Tensor | None:
    """[B|1, H] stays, [B|1, H, Sq] is padded."""
    return x if x is None or x.dim() == 2 else pad(x, 2, Sq)


def _pad_sequences(x: Tensor | None, N: int) -> Tensor | None:
    """[1, 2, n + 1] with empty sequences at the end, N in all."""
    if x is None:
        return None
    ends = x[:, :, -1:].expand(-1, -1, N + 1 - x.shape[2])
    return torch.cat([x, ends], dim=2)


def pad(x: Tensor, axis: int, size: int) -> Tensor:
    """x with zeros behind it."""
    if x.shape[axis] == size:
        return x
    padded = x.new_zeros([size if i == axis else n for i, n in enumerate(x.shape)])
    padded.narrow(axis, 0, x.shape[axis]).copy_(x)
    return padded


def cut(x: Tensor, *sizes: int) -> Tensor:
    """The first of x along each of its leading axes."""
    for axis, size in enumerate(sizes):
        x = x.narrow(axis, 0, size)
    return x.contiguous()


def present(x: Operands) -> Tensor:
    """(Sq, Sk) as the backends want it, written on the device: nothing is copied from the host."""
    lengths = torch.full((2,), x.k.shape[1], dtype=torch.int32, device=x.q.device)
    lengths[:1].fill_(x.q.shape[1])
    return lengths

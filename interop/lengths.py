"""Lengths rounded up, so that few programs serve them all.

XLA compiles a program for fixed shapes, and a new one takes seconds. So the first lengths of a kind of call run
as they are, and any others are padded to powers of two. The backend learns at run time which keys each query
sees: it computes nothing for the rest, and no position, mask or dropout moves. Only the order of sums may differ.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence

from torch import Tensor

from interop import key_ranges
from interop.operands import Operands, Options

_SMALLEST = 64
first: dict[Hashable, tuple[int, int]] = {}  # lengths of queries and keys


def room(direction: str, x: Operands, options: Options) -> tuple[int, int] | None:
    """(Sq, Sk) to pad a call to, or None to run it as it is, as always under JFLASH_EXACT_LENGTHS=1."""
    if os.environ.get("JFLASH_EXACT_LENGTHS") == "1":
        return None
    (B, Sq, H, D), (_, Sk, Hk, Dv) = x.q.shape, x.v.shape
    exact, rounded = (Sq, Sk), (_rounded(Sq), _rounded(Sk))
    others = tuple(None if t is None else tuple(n == 1 for n in t.shape) for t in x[3:])
    kind = (direction, x.q.device, x.q.dtype, B, H, Hk, D, Dv, others, options)
    return None if exact in (rounded, first.setdefault(kind, exact)) else rounded


def _rounded(n: int) -> int:
    """A lone query or key stays alone."""
    return n if n <= 1 else max(_SMALLEST, 1 << (n - 1).bit_length())


def padded(x: Operands, options: Options, Sq: int, Sk: int) -> tuple[Operands, Options]:
    """The same call with room for Sq queries and Sk keys; its window is in its key_ranges."""
    ranges = x.key_ranges
    if ranges is None:
        ranges = key_ranges.present(x.q.shape[1], x.k.shape[1], Sq, options.left, options.right, x.q.device)
    operands = x._replace(
        q=pad(x.q, 1, Sq),
        k=pad(x.k, 1, Sk),
        v=pad(x.v, 1, Sk),
        bias=_pad_square(x.bias, Sq, Sk),
        mask=_pad_square(x.mask, Sq, Sk),
        q_segment_ids=None if x.q_segment_ids is None else pad(x.q_segment_ids, 1, Sq),
        kv_segment_ids=None if x.kv_segment_ids is None else pad(x.kv_segment_ids, 1, Sk),
        alibi_slopes=_pad_slopes(x.alibi_slopes, Sq),
        key_ranges=pad(ranges, 2, Sq, -1),
    )
    return operands, options._replace(left=-1, right=-1)


def padded_rows(rows: Sequence[Tensor | None], Sq: int) -> list[Tensor | None]:
    """d_out, d_lse, out and lse with room for Sq queries."""
    return [None if x is None else pad(x, axis, Sq) for x, axis in zip(rows, (1, 2, 1, 2), strict=True)]


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


def pad(x: Tensor, axis: int, size: int, value: int = 0) -> Tensor:
    """x with more of a value behind it."""
    if x.shape[axis] == size:
        return x
    found = x.new_full([size if i == axis else n for i, n in enumerate(x.shape)], value)
    found.narrow(axis, 0, x.shape[axis]).copy_(x)
    return found


def cut(x: Tensor, *sizes: int) -> Tensor:
    """The first of x along each of its leading axes."""
    for axis, size in enumerate(sizes):
        x = x.narrow(axis, 0, size)
    return x.contiguous()

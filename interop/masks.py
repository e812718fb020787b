"""The masks of Hugging Face Transformers, as what the kernels take instead of a mask.

Transformers describes a mask by a function of positions and asks for it once a forward. A pattern that we know
becomes limits and segment ids, of O(N) memory; any other is computed as for "sdpa".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils


class Pattern(NamedTuple):
    """What queries may see that are the last of the keys."""

    left: int = -1  # keys before a query's position; -1 is all
    right: int = -1  # keys after it
    segment_ids: tuple[Tensor, Tensor] | None = None  # of the queries [B, Sq] and of the keys [B, Sk]

    def within(self, left: int, right: int) -> Pattern:
        return self._replace(left=_nearer(self.left, left), right=_nearer(self.right, right))


class Mask(Tensor):
    """A bool mask [B, 1, Sq, Sk] that is written out only if somebody computes with it.

    So a model may do with it what it likes, and the layers that only hand it on cost nothing.
    """

    pattern: Pattern

    @staticmethod
    def __new__(cls, pattern: Pattern, shape: tuple[int, ...], device: torch.device | str):
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        self.pattern = pattern
        return self

    def __init__(self, pattern: Pattern, shape: tuple[int, ...], device: torch.device | str):
        pass

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Mask({self.pattern}, {tuple(self.shape)}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.written_out, (args, kwargs or {}))
        return func(*args, **kwargs)

    def written_out(self) -> Tensor:
        """An ordinary tensor of the same values."""
        q_length, kv_length = self.shape[2:]
        i = torch.arange(q_length, device=self.device)[:, None] + kv_length - q_length
        j = torch.arange(kv_length, device=self.device)
        seen = torch.ones(self.shape, dtype=torch.bool, device=self.device)
        if self.pattern.left >= 0:
            seen &= j >= i - self.pattern.left
        if self.pattern.right >= 0:
            seen &= j <= i + self.pattern.right
        if self.pattern.segment_ids is not None:
            q_ids, kv_ids = self.pattern.segment_ids
            seen &= q_ids[:, None, :, None] == kv_ids[:, None, None, :]
        return seen


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,  # a tensor where a static cache counts on the device
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **options,
) -> Tensor | None:
    """The mask that `transformers.masking_utils.sdpa_mask` returns for the same arguments, its None included.

    A `Mask` where the pattern is known, but an ordinary tensor for the compiler.
    """
    pattern = None if torch.compiler.is_compiling() else _read(mask_function)
    banded = pattern is not None and (pattern.left >= 0 or pattern.right >= 0)
    last = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    into_compiled = q_length == 1 and not allow_is_causal_skip  # made here, taken by a compiled decoding step
    if pattern is None or (banded and not last) or into_compiled:
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=allow_is_causal_skip, device=device,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip, **options,
        )  # fmt: skip
    if pattern.left >= kv_length - 1:
        pattern = pattern._replace(left=-1)
    if attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padding is not None
        pattern = _without(pattern, ~padding[:, kv_offset : kv_offset + kv_length], q_length)
    if pattern == Pattern(right=0) and allow_is_causal_skip and q_length in (1, kv_length):
        return None
    if pattern == Pattern() and allow_is_bidirectional_skip:
        return None
    return Mask(pattern, (batch_size, 1, q_length, kv_length), device)


def _read(function: Callable) -> Pattern | None:
    """The pattern that a mask function of Transformers draws, or None if it is not one of those we know."""
    if function is masking_utils.causal_mask_function:
        return Pattern(right=0)
    if function is masking_utils.bidirectional_mask_function:
        return Pattern()
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    maker = function.__qualname__.partition(".")[0]
    held = inspect.getclosurevars(function).nonlocals
    if maker == "sliding_window_overlay" and held["sliding_window"] >= 1:
        return Pattern(left=held["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay":
        return Pattern(held["sliding_window"], held["sliding_window"])
    if maker == "packed_sequence_mask_function":
        return Pattern(segment_ids=(held["packed_sequence_mask"],) * 2)
    if maker == "remap_positions_for_packed_sequence":  # distances within a sequence stay as they are
        return _read(held["mask_function"])
    if maker == "and_masks":
        return _all([_read(part) for part in held["mask_functions"]])
    return None


def _all(parts: list[Pattern | None]) -> Pattern | None:
    """What every part allows, or None if that is no pattern."""
    known = [part for part in parts if part is not None]
    segments = [part.segment_ids for part in known if part.segment_ids is not None]
    if len(known) < len(parts) or len(segments) > 1:
        return None
    limited = functools.reduce(lambda found, part: found.within(part.left, part.right), known, Pattern())
    return limited._replace(segment_ids=segments[0] if segments else None)


def _without(pattern: Pattern, hidden: Tensor, q_length: int) -> Pattern:
    """The pattern without the keys that are hidden [B, Sk]."""
    if not hidden.any():
        return pattern
    q_ids, kv_ids = pattern.segment_ids or (
        hidden.new_zeros((hidden.shape[0], length), dtype=torch.int32) for length in (q_length, hidden.shape[1])
    )
    return pattern._replace(segment_ids=(q_ids, kv_ids.masked_fill(hidden, -1)))


def _nearer(a: int, b: int) -> int:
    """The smaller of two limits, where -1 is none."""
    return max(a, b) if min(a, b) < 0 else min(a, b)

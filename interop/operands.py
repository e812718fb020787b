"""What the operators take: tensors, and static options."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors of both operators, in their order. B|1: of length 1 where the whole batch shares it."""

    q: Tensor  # [B, Sq, H, D]
    k: Tensor  # [B, Sk, Hk, D]
    v: Tensor  # [B, Sk, Hk, Dv]
    bias: Tensor | None = None  # [B|1, H|1, Sq|1, Sk|1] floating point
    sinks: Tensor | None = None  # [B|1, H] floating point
    mask: Tensor | None = None  # [B|1, H|1, Sq|1, Sk|1] bool, True = visible
    q_segment_ids: Tensor | None = None  # [B, Sq] int32
    kv_segment_ids: Tensor | None = None  # [B, Sk] int32
    alibi_slopes: Tensor | None = None  # [B|1, H] float32, or [B|1, H, Sq] with key_ranges
    dropout_seed: Tensor | None = None  # [n, 2] int32: a JAX random key for each B / n entries of the batch
    key_ranges: Tensor | None = None  # [B|1, 3, Sq] int32: of each query its first and last key, and its position


class Options(NamedTuple):
    """Their static arguments, in their order; -1 leaves a side of the window open, as it must be with key_ranges."""

    scale: float | None = None  # None: D**-0.5
    left: int = -1
    right: int = -1  # 0 is causal
    softcap: float = 0.0  # 0 is off
    dropout_p: float = 0.0
    deterministic: bool = False


TENSORS = len(Operands._fields)


def given(x: Operands) -> tuple[Tensor | None, ...]:
    """The operands: just q, k, v where there is nothing else."""
    return x if any(t is not None for t in x[3:]) else x[:3]

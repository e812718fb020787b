"""The shared vocabulary: what is known about a call before it runs, and the arrays it runs on.

Axes are letters, the same everywhere: B batch, H query heads, Hk key/value heads, Sq and Sk lengths,
D the query/key head dim, Dv the value head dim.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """The static facts of one softmax-attention call; hashable, so it can key a jit cache.

    A query i sees a key j when `i + offset - left <= j <= i + offset + right`, both ends inclusive, and
    every dynamic mask allows it. `None` is unbounded; causal attention is `right == 0`.
    """

    target: str  # where it will run: "cpu", "tpu", or the compute capability, "sm_90"
    dtype: str
    B: int
    H: int
    Hk: int
    Sq: int
    Sk: int
    D: int
    Dv: int
    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    bias_shape: tuple[int, int, int, int] | None = None
    bias_gradient: bool = False
    mask_shape: tuple[int, int, int, int] | None = None
    segments: bool = False
    alibi: bool = False
    sinks: bool = False
    dropout_rate: float = 0.0
    deterministic: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.H // self.Hk

    @property
    def offset(self) -> int:
        """Masks are aligned to the bottom right: query i stands at key position i + offset."""
        return self.Sk - self.Sq

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def empty(self) -> bool:
        """No query row has a key to see, or there is no query row."""
        return 0 in (self.B, self.Sq, self.Sk, self.Dv)


class AttentionArrays(NamedTuple):
    """The arrays of one call; an absent feature is None and costs nothing.

    Leading axes of size 1 broadcast over B; `bias` and `mask` broadcast over any of their four axes.
    """

    q: jax.Array  # [B, Sq, H, D]
    k: jax.Array  # [B, Sk, Hk, D]
    v: jax.Array  # [B, Sk, Hk, Dv]
    bias: jax.Array | None = None  # [B|1, H|1, Sq|1, Sk|1] floating point
    mask: jax.Array | None = None  # [B|1, H|1, Sq|1, Sk|1] bool, True = visible
    q_segment_ids: jax.Array | None = None  # [B|1, Sq] int32
    kv_segment_ids: jax.Array | None = None  # [B|1, Sk] int32
    alibi_slopes: jax.Array | None = None  # [B|1, H] float32
    sinks: jax.Array | None = None  # [B|1, H] floating point
    dropout_seeds: jax.Array | None = None  # [B, 2] uint32


class AttentionGradients(NamedTuple):
    """Cotangents of the differentiable arrays, in their shapes and dtypes."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None = None
    sinks: jax.Array | None = None

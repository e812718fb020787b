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
    lse_gradient: bool = True  # of a backward: lse may have a cotangent other than 0
    mask_shape: tuple[int, int, int, int] | None = None
    segments: bool = False
    key_ranges: bool = False  # each query brings its own keys, so left and right are None
    page: int | None = None  # of a cache with a page table: keys in a page
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
    key_ranges: jax.Array | None = None  # [B|1, 3, Sq] int32: the first and the last key a query sees (last < first:
    # none), and the key position where it stands, which ALiBi measures from
    alibi_slopes: jax.Array | None = None  # [B|1, H] float32, or [B|1, H, Sq] with key_ranges
    sinks: jax.Array | None = None  # [B|1, H] floating point
    dropout_seeds: jax.Array | None = None  # [B, 2] uint32
    row_ends: jax.Array | None = None  # [B|1, 2] int32, with key_ranges: q, out and their cotangents from the first row
    # on, k and v from the second on belong to no sequence and may be anything, NaN too; None: all rows are numbers


class CacheArrays(NamedTuple):
    """The arrays of a call on a key/value cache, whose problem counts in Sk all that fits.

    The cache has N rows of `page` keys each. A batch entry has one row, or several, its pages. Its queries stand at
    the end of its keys: left and right of the problem count from `i + ends[b] - Sq`.
    """

    q: jax.Array  # [B, Sq, H, D]
    k: jax.Array  # [N, page, Hk, D]
    v: jax.Array  # [N, page, Hk, Dv]; where no query sees a key anything may lie, NaN too
    ends: jax.Array  # [B] int32: where the keys of each entry end
    starts: jax.Array | None = None  # [B] int32: the first of them; None: 0
    pages: jax.Array | None = None  # [B, Sk / page] int32: which rows are an entry's, in order; None: its own
    alibi_slopes: jax.Array | None = None  # [B|1, H] float32
    sinks: jax.Array | None = None  # [B|1, H] floating point


class AttentionGradients(NamedTuple):
    """Cotangents of the differentiable arrays, in their shapes and dtypes."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None = None
    sinks: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class LinearProblem:
    """The static facts of one linear-attention call.

    Weights are `scale * (q_i . k_j) * M_ij`. M is the mask, or 1 where j may be seen times the decay
    `exp(sum of log_decay[s])`: over j < s <= i for a key before its query, over i <= s < j for one after it.
    Each of Hq, Hk and Hv divides H; output head h reads head `h // (H / Hx)` of an operand with Hx heads.
    """

    target: str  # where it will run: "cpu", "tpu", or the compute capability, "sm_90"
    dtype: str
    B: int
    H: int  # heads of the output, the decay and the state: the largest of Hq, Hk, Hv
    Hq: int
    Hk: int
    Hv: int
    Sq: int
    Sk: int
    D: int
    Dv: int
    scale: float
    before: bool = True  # a query sees itself and the keys before it
    after: bool = False  # a query sees itself and the keys after it
    decay: str | None = None  # "head": log_decay[:, 0, h]; "token": log_decay[:, t, h]
    decay_gradient: bool = False
    mask_shape: tuple[int, int, int, int] | None = None
    mask_gradient: bool = False
    normalize: bool = False  # outputs are divided by the sum of their weights, 0 where it is 0
    sequences: int | None = None  # of a packed call, whose B is 1
    initial_state: bool = False
    final_state: bool = True  # somebody may want the state after the last token
    chunk_size: int | None = None  # None: the backend's choice

    @property
    def causal(self) -> bool:
        """A query sees keys of one side only, so the call has a state."""
        return self.before != self.after

    @property
    def states(self) -> int:
        """How many states go in and come out."""
        return self.B if self.sequences is None else self.sequences

    @property
    def empty(self) -> bool:
        """No weight to compute: no row, no key, or an output without width."""
        return 0 in (self.B, self.Sq, self.Sk, self.Dv)


class LinearArrays(NamedTuple):
    """The arrays of one call; an absent feature is None. A leading axis of 1 broadcasts over B."""

    q: jax.Array  # [B, Sq, Hq, D]
    k: jax.Array  # [B, Sk, Hk, D]
    v: jax.Array  # [B, Sk, Hv, Dv]
    log_decay: jax.Array | None = None  # [B|1, Sq|1, H] <= 0, -inf forgets all
    mask: jax.Array | None = None  # [B|1, H|1, Sq|1, Sk|1] bool or floating point
    kv: jax.Array | None = None  # [states, H, D, Dv] float32: the sum of decayed k v^T before the first token
    z: jax.Array | None = None  # [states, H, D] float32: the same with ones for v, when normalizing
    cu_seqlens: jax.Array | None = None  # [sequences + 1] int32; tokens outside of it are not read


class LinearResults(NamedTuple):
    """What a forward returns. The state is None unless causal, z and norm unless normalizing."""

    out: jax.Array  # [B, Sq, H, Dv] in q's dtype
    norm: jax.Array | None = None  # [B, Sq, H] float32, the sum of the weights: what the backward divides by
    kv: jax.Array | None = None  # [states, H, D, Dv] float32, after the last token
    z: jax.Array | None = None  # [states, H, D] float32


class LinearGradients(NamedTuple):
    """Cotangents of the differentiable arrays, in their shapes and dtypes."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None = None
    mask: jax.Array | None = None
    kv: jax.Array | None = None
    z: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class L1Problem(AttentionProblem):
    """The static facts of one L1-attention call: attention on distances `d_ij = sum_w |q_iw - k_jw|`.

    Scores are `-scale d` ("neg") or `1 / (eps + scale d)` ("reciprocal"), then bias and masks as in softmax
    attention; softcap, ALiBi and dropout are never set. Arrays and gradients are AttentionArrays and
    AttentionGradients. `lse` is 0 where the weights have no denominator. A tie has no gradient: sign(0) = 0.
    """

    kind: str = "neg"  # or "reciprocal"
    eps: float = 0.0  # of "reciprocal"
    weight: str = "softmax"  # or "exp": exp(s); "tanh1": 1 + tanh(s)
    center: bool = False  # d is less (sum_w |q_iw| + sum_w |k_jw|) / sqrt(2)
    exclude_diagonal: bool = False  # query i does not see key i + offset
    compute: str = "auto"  # how |q - k| is found; "f32": subtracted and added in float32

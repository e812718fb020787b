"""From padded batches to packed sequences and back.

Under jit the number of tokens is not known, so there each function takes it as `size`: at least the number of
tokens, with slots behind them that hold zeros and that `pad_input` leaves out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jflash._arguments import array, known


class Unpadded(NamedTuple):
    """What `unpad_input` returns, in flash_attn's order."""

    x: jax.Array  # [T, ...] the tokens of all rows, one after another
    indices: jax.Array  # int32 [T]: where each was in [B S]; B S for an empty slot
    cu_seqlens: jax.Array  # int32 [B + 1]
    max_seqlen: int | jax.Array  # an int outside of jit
    seqused: jax.Array  # int32 [B]: tokens of each row, without unused ones


def unpad_input(x: jax.Array, mask: jax.Array, *, unused_mask: jax.Array | None = None, size: int | None = None):
    """`x[mask]`, packed: the tokens of a padded batch without the padding.

    Args:
        x: [B, S, ...].
        mask: [B, S] bool or 0/1 integers, True for a token.
        unused_mask: [B, S], True for slots to keep that hold no token; nowhere where mask is.
        size: T of the result, for use under jit. Default: the number of tokens. If under jit there are more
            tokens than that, a floating-point result is NaN.

    Returns:
        Unpadded (x [T, ...], indices [T], cu_seqlens [B + 1], max_seqlen, seqused [B]).

    Raises:
        ValueError, TypeError: shapes or dtypes are wrong, `size` is too small or missing under jit.

    Source: the interface of flash_attn 2's `bert_padding`.
    """
    x, used = array("x", x), _mask("mask", mask, x)
    kept = used
    if unused_mask is not None:
        unused = _mask("unused_mask", unused_mask, x)
        if not isinstance(used, Tracer) and not isinstance(unused, Tracer) and bool((used & unused).any()):
            raise ValueError("unused_mask must be False wherever mask is True")
        kept = used | unused
    lengths = kept.sum(axis=1, dtype=jnp.int32)
    packed, indices = _gather(x, kept, size)
    return Unpadded(packed, indices, _cumulative(lengths), _longest(lengths), used.sum(axis=1, dtype=jnp.int32))


def unpad_input_for_concatenated_sequences(
    x: jax.Array, lengths: jax.Array, *, size: int | None = None, sequences: int | None = None
):
    """`unpad_input` for rows that hold several sequences each.

    Args:
        x: [B, S, ...].
        lengths: [B, S] integers: the nonzero entries of a row are the lengths of its sequences, in order;
            `[[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]]` is two sequences in the first row and one in the second.
        size: T, as for `unpad_input`. sequences: N, needed under jit; sequences that are not there have length 0.
            If under jit there are more, or a row's are longer than S, a floating-point result is NaN.

    Returns:
        (x [T, ...], indices [T], cu_seqlens [N + 1], max_seqlen).

    Raises:
        ValueError, TypeError: as for `unpad_input`, or a row's lengths have a sum above S.
    """
    x, lengths = array("x", x), known("lengths", lengths)
    if lengths.shape != x.shape[:2] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths {lengths.dtype.name} {lengths.shape} must be integers [B, S]={list(x.shape[:2])}")
    S, rows = x.shape[1], lengths.sum(axis=1)
    if not isinstance(lengths, Tracer) and (bool((rows > S).any()) or bool((lengths < 0).any())):
        raise ValueError(f"lengths of the rows, {rows.tolist()} in sum, must be >= 0 and <= {S}")
    count = (lengths != 0).sum()
    N = _size("sequences", sequences, count)
    wrong = (count > N) | (rows > S).any() | (lengths < 0).any()
    packed, indices = _gather(x, np.arange(S) < rows[:, None], size, wrong)
    flat = lengths.ravel()
    (there,) = jnp.nonzero(flat, size=N, fill_value=flat.size)
    flat = jnp.asarray(flat).at[there].get(mode="fill", fill_value=0)
    return packed, indices, _cumulative(flat), _longest(lengths)


def pad_input(x: jax.Array, indices: jax.Array, batch: int, seqlen: int) -> jax.Array:
    """[T, ...] back to [batch, seqlen, ...]: token t goes to `indices[t]` of [batch seqlen], zeros elsewhere.

    A token whose index is `batch seqlen` is left out. Other indices raise where they are known.
    """
    x, indices = array("x", x), known("indices", indices)
    if indices.shape != x.shape[:1] or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices {indices.dtype.name} {indices.shape} must be integers [T]={[x.shape[0]]}")
    if not isinstance(indices, Tracer) and indices.size and not 0 <= indices.min() <= indices.max() <= batch * seqlen:
        raise ValueError(f"indices {indices.min()} to {indices.max()} must be in [0, {batch * seqlen}]")
    padded = jnp.zeros((batch * seqlen, *x.shape[1:]), x.dtype).at[indices].set(x, mode="drop")
    return padded.reshape(batch, seqlen, *x.shape[1:])


def _gather(x: jax.Array, kept: jax.Array, size: int | None, wrong: Any = False) -> tuple[jax.Array, jax.Array]:
    """The kept tokens of x, and where they were; NaN if what is traced turns out to be wrong."""
    tokens = kept.sum()
    size = _size("size", size, tokens)
    (indices,) = jnp.nonzero(kept.ravel(), size=size, fill_value=kept.size)
    packed = x.reshape(-1, *x.shape[2:]).at[indices].get(mode="fill", fill_value=0)
    if isinstance(tokens, Tracer) and jnp.issubdtype(x.dtype, jnp.floating):
        packed = jnp.where((tokens > size) | wrong, jnp.nan, packed)  # too late to raise
    return packed, indices.astype(jnp.int32)


def _size(name: str, size: int | None, needed: jax.Array) -> int:
    if isinstance(needed, Tracer):
        if size is None:
            raise ValueError(f"{name} must be given under jit, where it is not known from the values")
        return size
    if size is not None and size < int(needed):
        raise ValueError(f"{name}={size} must be >= {int(needed)}")
    return int(needed) if size is None else size


def _mask(name: str, mask, x: jax.Array) -> Any:
    mask = known(name, mask)
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise TypeError(f"{name}.dtype={mask.dtype.name} must be bool or an integer type")
    if x.ndim < 2 or mask.shape != x.shape[:2]:
        raise ValueError(f"{name}.shape={mask.shape} must be [B, S]={list(x.shape[:2])}")
    return mask.astype(bool)


def _cumulative(lengths: jax.Array) -> jax.Array:
    return jnp.pad(jnp.cumsum(lengths, dtype=jnp.int32), (1, 0))


def _longest(lengths) -> int | jax.Array:
    longest = lengths.max(initial=0)
    return longest if isinstance(longest, Tracer) else int(longest)

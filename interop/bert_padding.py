"""The helpers of flash_attn 2's `bert_padding`: padded batches to packed sequences and back, in torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch without the padding. Waits for the GPU to learn their number.

    Args:
        hidden_states: [B, S, ...].
        attention_mask: [B, S] bool or 0/1, true for a token.
        unused_mask: [B, S], true for slots to keep that hold no token, nowhere where attention_mask is.

    Returns:
        (hidden_states [T, ...], indices int64 [T] in [B S], cu_seqlens int32 [B + 1], max_seqlen, seqused int32 [B]):
        seqused counts the tokens of attention_mask alone.

    Raises:
        ValueError: a mask is not [B, S].
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", kept)):
        if mask.shape != hidden_states.shape[:2]:
            raise ValueError(f"{name}.shape={list(mask.shape)} must be [B, S]={list(hidden_states.shape[:2])}")
    used, lengths = (mask.sum(dim=1, dtype=torch.int32) for mask in (attention_mask, kept))
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _cumulative(lengths), longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` for rows that hold several sequences: nonzero entries of a row [B, S] are their lengths.

    Returns (hidden_states [T, ...], indices [T], cu_seqlens [N + 1], max_seqlen) for N sequences in all.
    """
    if attention_mask_in_length.shape != hidden_states.shape[:2]:
        shape = list(attention_mask_in_length.shape)
        raise ValueError(f"attention_mask_in_length.shape={shape} must be [B, S]={list(hidden_states.shape[:2])}")
    column = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    indices = (column < attention_mask_in_length.sum(dim=1)[:, None]).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0]
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _cumulative(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """[T, ...] back to [batch, seqlen, ...], with zeros where no token is."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """`input[indices]` along the first axis."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros [first_axis_dim, ...] with values [T, ...] at indices [T], which must differ."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def _cumulative(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))

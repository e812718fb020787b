"""Which keys each query sees where the call's own shape does not say: int32 [B|1, 3, Sq], an operand of the kernels.

For each query its first and its last key, and its position among the keys. One form for packed sequences and for
lengths that are padded. Computed by torch, so that the values change without a new program.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, tokens: int, left: int, right: int) -> Tensor:
    """[1, 3, tokens] of packed sequences, whose queries stand at the end of their keys, within a window.

    cu_seqlens are integers [N + 1]; -1 leaves a side of the window open. A query behind the last sequence sees
    no key.
    """
    q_starts, k_starts = (x.to(torch.int32).contiguous() for x in (cu_seqlens_q, cu_seqlens_k))
    q_ends, k_ends = q_starts.roll(-1), k_starts.roll(-1)
    of_sequence = torch.stack([k_starts, k_ends - 1, k_ends - q_ends])  # and behind the last: its keys end at -1
    token = torch.arange(tokens, dtype=torch.int32, device=q_starts.device)
    sequence = torch.searchsorted(q_starts[1:], token, right=True)
    first, last, position = of_sequence.index_select(1, sequence).unbind()
    position = position + token
    if left >= 0:
        first = torch.maximum(first, position - left)
    if right >= 0:
        last = torch.minimum(last, position + right if right else position)
    return torch.stack([first, last, position])[None]


def present(queries: int, keys: int, room: int, left: int, right: int, device: torch.device) -> Tensor:
    """[1, 3, room] where only so many queries and keys are there, the queries at the end of the keys.

    A query that is not there sees no key, so that tiles of them are skipped. Nothing is copied from the host.
    """
    position = torch.arange(keys - queries, keys - queries + room, dtype=torch.int32, device=device)
    first = torch.zeros_like(position) if left < 0 else (position - left).clamp_(min=0)
    last = torch.full_like(position, keys - 1) if right < 0 else (position + right).clamp_(max=keys - 1)
    last[queries:] = -1
    return torch.stack([first, last, position])[None]

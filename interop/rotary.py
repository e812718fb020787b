"""Rotary position embedding for torch tensors, in torch operations: one pass that torch.compile can fuse."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turns each pair (a, b) of features of a token at position t: `(a cos[t] - b sin[t], a sin[t] + b cos[t])`.

    Args:
        x: [B, S, H, D], or [T, H, D] with cu_seqlens. The first R of its D features are turned, the others kept.
        cos, sin: [positions, R / 2], R <= D.
        interleaved: pairs are (0, 1), (2, 3) ... (GPT-J) rather than (0, R/2), (1, R/2 + 1) ... (NeoX, Llama).
        inplace: write the result into x, and return x.
        seqlen_offsets: position of the first token of each sequence: an integer, or integers [B] (or [N]).
        cu_seqlens: integers [N + 1], where packed sequences start. max_seqlen: not needed.

    Returns:
        x, turned in float32 or wider, in its dtype. Differentiable in x, cos and sin.

    Raises:
        ValueError: a shape breaks a rule above. IndexError: a position outside of cos, on CPU.

    Source: Su et al., RoFormer (arXiv 2104.09864); the interface of flash_attn 2.
    """
    axes = 4 if cu_seqlens is None else 3
    if x.dim() != axes:
        expected = "[batch, seq, heads, dim]" if axes == 4 else "[tokens, heads, dim] with cu_seqlens"
        raise ValueError(f"x.shape={list(x.shape)} must be {expected}")
    row = torch.arange(x.shape[-3], device=x.device)
    if cu_seqlens is None:
        offset = seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
        positions = row + offset
    else:
        last = cu_seqlens.shape[0] - 2
        sequence = (torch.searchsorted(cu_seqlens, row.to(cu_seqlens.dtype), right=True) - 1).clamp(0, max(last, 0))
        offset = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
        positions = torch.where(row < cu_seqlens[-1], row - cu_seqlens[sequence] + offset, 0)
    turned = rotate(x, cos, sin, positions, interleaved)
    return x.copy_(turned) if inplace else turned


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """`apply_rotary_emb` of x [..., S, H, D] at positions [..., S] or [S]."""
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(f"cos.shape={list(cos.shape)} and sin.shape={list(sin.shape)} must be one [positions, R / 2]")
    R = 2 * cos.shape[1]
    if R > x.shape[-1]:
        raise ValueError(f"rotary dim R={R}, twice the width of cos, must be <= head_dim={x.shape[-1]}")
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t[positions].to(wide).unsqueeze(-2) for t in (cos, sin))
    turned, kept = x[..., :R].to(wide), x[..., R:]
    if interleaved:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a, b = turned.chunk(2, dim=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), kept], dim=-1)


class RotaryEmbedding(torch.nn.Module):
    """Turns the queries and keys of qkv by angles `t base^(-2 i / dim)`, whose tables it keeps and grows.

    Source: Su et al., RoFormer (arXiv 2104.09864); the interface of flash_attn 2.
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False):
        super().__init__()
        self.dim, self.base, self.interleaved = dim, base, interleaved
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [positions or more, dim / 2], on the device of `like` and in its dtype."""
        found = self._tables
        if found is None or len(found[0]) < positions or found[0].device != like.device or found[0].dtype != like.dtype:
            i = torch.arange(0, self.dim, 2, device=like.device, dtype=torch.float32)
            t = torch.arange(positions, device=like.device, dtype=torch.float32)
            angle = torch.outer(t, self.base ** (-i / self.dim))
            found = self._tables = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
        return found

    def forward(self, qkv: Tensor, seqlen_offset: int | Tensor = 0, max_seqlen: int | None = None) -> Tensor:
        """qkv [B, S, 3, H, D] with q and k turned. A tensor of offsets needs max_seqlen, the last position + 1."""
        if isinstance(seqlen_offset, Tensor) and max_seqlen is None:
            raise ValueError("seqlen_offset of several sequences needs max_seqlen, the last position + 1")
        q, k, v = qkv.unbind(2)
        q, k = (self.turn(x, seqlen_offset, max_seqlen) for x in (q, k))
        return torch.stack([q, k, v], dim=2)

    def turn(self, x: Tensor, seqlen_offset: int | Tensor = 0, max_seqlen: int | None = None) -> Tensor:
        """x [B, S, H, D], turned."""
        length = max_seqlen if isinstance(seqlen_offset, Tensor) else x.shape[1] + seqlen_offset
        cos, sin = self.tables(length, x)
        return apply_rotary_emb(x, cos, sin, self.interleaved, seqlen_offsets=seqlen_offset)

"""The modules of the seed, github.com/tlh24/l1-attention, under its names and in its argument order.

A program of the seed runs with its import replaced: `import interop as l1attn`. Its dense scores were

    July 2023 to March 2024    1 / (0.001 + sum|q - k| / sqrt(D))    [batch, head, key, query]
    since April 2024           -sum|q - k| / sqrt(D)                 [batch, key, query, head]

The second is the default here, the first `L1Attn(kind="reciprocal", layout="bhst")`; its README had no sqrt(D), which
is `scale=1.0`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interop._arguments import values_are_known
from interop.l1 import l1_attention_sparse, l1_scores


class L1Attn(nn.Module):
    """Scores of q and k [B, T, H, D], before any softmax: by default `-sum_w |q_tw - k_sw| / sqrt(D)`, [B, s, t, H].

    A softmax over the keys is then one over axis 1. Keys may be more or fewer than queries.

    Args: as of `interop.l1_scores`.
    """

    def __init__(
        self, *, kind: str = "neg", scale: float | None = None, eps: float = 1e-3, center: bool = False,
        layout: str = "bsth",
    ):  # fmt: skip
        super().__init__()
        self.options = {"kind": kind, "scale": scale, "eps": eps, "center": center, "layout": layout}

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return l1_scores(q, k, **self.options)


class L1AttnSparse(nn.Module):
    """`o_t = sum_s P_ts v_s` over the pairs (t, s) of a list, `P_ts = exp(l_ts) / (1 + sum_u exp(l_tu))`.

    l is the score of `L1Attn`. With use_softmax=False `P_ts = exp(l_ts)`. [B, T, H, D] in and out.
    """

    def forward(
        self, v: Tensor, q: Tensor, k: Tensor, coo: Tensor, dst_mxlen: int | None = None, use_softmax: bool = True
    ) -> Tensor:
        """coo: integers [pairs, 2] of (query, key), or [pairs, 4] of `expandCoo`. dst_mxlen is checked, not needed."""
        return _sparse(v, None, q, k, coo, dst_mxlen, use_softmax)


class L1AttnSparseBidi(nn.Module):
    """`L1AttnSparse` that goes both ways: `o = P vf + P^T vb`."""

    def forward(
        self,
        vf: Tensor,
        vb: Tensor,
        q: Tensor,
        k: Tensor,
        coo: Tensor,
        dst_mxlen: int | None = None,
        use_softmax: bool = True,
    ) -> Tensor:
        """As of `L1AttnSparse`."""
        return _sparse(vf, vb, q, k, coo, dst_mxlen, use_softmax)


def expandCoo(co: Tensor) -> tuple[Tensor, int, int]:
    """Pairs [E, 2] of (query, key) -> int32 [E, 4], with each one's rank among those of its query and of its key.

    Also the largest number of pairs of a query, and of a key.
    """
    ranks, longest = zip(*(_ranks(co[:, n]) for n in (0, 1)), strict=True)
    return torch.stack([co[:, 0], co[:, 1], *ranks], dim=1).int(), *longest


def _ranks(index: Tensor) -> tuple[Tensor, int]:
    """How many equal entries are before each one, and the most there are of one."""
    order = index.argsort(stable=True)
    counts = index.bincount()
    first = counts.cumsum(0) - counts
    ranks = torch.empty_like(index)
    ranks[order] = torch.arange(len(index), device=index.device, dtype=index.dtype) - first[index[order]].to(
        index.dtype
    )
    return ranks, int(counts.max()) if len(counts) else 0


def _sparse(v, vb, q, k, coo: Tensor, dst_mxlen: int | None, use_softmax: bool) -> Tensor:
    if coo.dim() != 2 or coo.shape[1] not in (2, 4):
        raise ValueError(f"coo.shape={list(coo.shape)} must be [pairs, 2] or [pairs, 4]")
    pairs = coo[:, :2]
    if dst_mxlen is not None and values_are_known(pairs) and len(pairs):
        longest = int(pairs[:, 0].unique(return_counts=True)[1].max())
        if dst_mxlen < longest:
            raise ValueError(f"dst_mxlen={dst_mxlen} must be >= {longest}, the pairs of one query")
    return l1_attention_sparse(q, k, v, pairs, vb=vb, weight="softmax" if use_softmax else "exp")

"""The layer of TransNormer as torch modules: linear attention with decay, SRMSNorm and gates, on these kernels.

Source: Qin et al., TransNormerLLM (arXiv 2307.14995), without its rotary embedding in the first layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interop.linear import State, linear_attention


class SRMSNorm(nn.Module):
    """`x / (|x| / sqrt(d))` over the last axis of length d, without a weight; computed in float32 or wider."""

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class NormLinearAttention(nn.Module):
    """`(sigmoid(x Wu) * SRMSNorm(attend(silu(x Wq), silu(x Wk), silu(x Wv)))) Wo`, with scale 1.

    Args:
        dim: width of the input and the output.
        heads: a divisor of dim; head h of layer l decays as `jflash.linear_variants.lightning_log_decay` says.
        layer_idx, num_layers, convention: as there.
        causal: False: tokens see both sides, decayed both ways.
    """

    def __init__(
        self, dim: int, heads: int, *, layer_idx: int, num_layers: int, convention: str = "alibi", causal: bool = True
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        self.heads = heads
        self.causal = causal
        self.qkvu = nn.Linear(dim, 4 * dim, bias=False)
        self.norm = SRMSNorm()
        self.out = nn.Linear(dim, dim, bias=False)
        self.register_buffer("log_decay", _log_decay(heads, layer_idx, num_layers, convention))

    def forward(
        self, x: Tensor, state: State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """[B, S, dim] -> [B, S, dim], and the state after the last token, to go on from."""
        q, k, v, u = self.qkvu(x).chunk(4, dim=-1)
        q, k, v = (F.silu(y).unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        found = linear_attention(
            q, k, v, log_decay=self.log_decay, causal=self.causal, scale=1.0, initial_state=state,
            return_state=return_state,
        )  # fmt: skip
        out, state = found if isinstance(found, tuple) else (found, None)
        out = self.out(torch.sigmoid(u) * self.norm(out.flatten(-2)))
        return out if state is None else (out, state)


class GatedLinearUnit(nn.Module):
    """`(x Wv * x Wu) Wo`: the feed-forward of TransNormer, without an activation."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.vu = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v, u = self.vu(x).chunk(2, dim=-1)
        return self.out(v * u)


class TransNormerBlock(nn.Module):
    """`x + attention(SRMSNorm(x))`, then `x + glu(SRMSNorm(x))`; arguments as of `NormLinearAttention`.

    hidden: width of the feed-forward; default 3 dim.
    """

    def __init__(self, dim: int, heads: int, *, hidden: int | None = None, **attention):
        super().__init__()
        self.norm = SRMSNorm()
        self.attention = NormLinearAttention(dim, heads, **attention)
        self.glu = GatedLinearUnit(dim, hidden or 3 * dim)

    def forward(
        self, x: Tensor, state: State | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """[B, S, dim] -> [B, S, dim], and the state after the last token, to go on from."""
        found = self.attention(self.norm(x), state, return_state)
        out, state = found if isinstance(found, tuple) else (found, None)
        x = x + out
        x = x + self.glu(self.norm(x))
        return x if state is None else (x, state)


def _log_decay(heads: int, layer_idx: int, num_layers: int, convention: str) -> Tensor:
    from jflash.linear_variants import lightning_log_decay  # here: importing interop leaves JAX alone

    return torch.tensor(lightning_log_decay(heads, layer_idx, num_layers, convention).tolist())

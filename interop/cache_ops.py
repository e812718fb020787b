"""The torch operator `jflash::attention_with_cache`: attention on a key/value cache, which it reads in place."""

from __future__ import annotations

import torch

from interop import bridge
from interop.operands import Options
from interop.ops import TAGS, empty_outputs, kernels

_library = torch.library.Library("jflash", "FRAGMENT")
_library.define(
    "attention_with_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqlens, Tensor? leftpad, Tensor? pages, "
    "Tensor? alibi_slopes, float? scale, int left, int right, float softcap) -> (Tensor out, Tensor lse)",
    tags=TAGS,
)
attention_with_cache = torch.ops.jflash.attention_with_cache.default


def _forward(q, k_cache, v_cache, seqlens, leftpad, pages, alibi_slopes, scale, left, right, softcap):
    """out [B, Sq, H, Dv] and lse [B, H, Sq]; NaN for an entry whose length is negative."""
    if q.numel() == 0 or k_cache.numel() == 0:
        out, lse = empty_outputs(q, k_cache, v_cache)
        return out.zero_(), lse.fill_(float("-inf"))
    indices = (None if x is None else x.to(torch.int32) for x in (seqlens, leftpad, pages))
    tensors = (q, k_cache, v_cache, *indices, alibi_slopes)
    options = Options(scale, left, right, softcap)
    return tuple(bridge.call(kernels().with_cache, tensors, options=options))


torch.library.register_kernel("jflash::attention_with_cache", ("cpu", "cuda"), _forward, lib=_library)
torch.library.register_fake("jflash::attention_with_cache", empty_outputs, lib=_library)

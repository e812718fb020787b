"""`attn_implementation="jflash"` for the models of Hugging Face Transformers.

    interop.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="jflash")

A layer sees what it would see under "sdpa". Nothing is patched before `register` is called.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers import __version__ as installed

from interop import _arguments, key_ranges
from interop.attention import attention
from interop.masks import Mask, Pattern, mask
from interop.operands import Options
from interop.sdpa import causal_from_top_left

_registered: set[str] = set()


def register(name: str = "jflash") -> str:
    """Makes `attn_implementation=name` known to Transformers, in `from_pretrained` and at run time.

    Works for the models that look their attention up by name, which `model.set_attn_implementation` accepts
    too; others raise ValueError. Transformers takes a name with "flash" in it for a package to install, or
    swaps it for one that the model prefers, and refuses it masks of chunks: `register` replaces these checks, for
    this name only.

    Returns the name.

    Raises:
        RuntimeError: this version of Transformers has other masks, or no such check.
    """
    known = "q_offset" in inspect.signature(masking_utils.sdpa_mask).parameters
    if not known or not hasattr(PreTrainedModel, "_check_and_adjust_attn_implementation"):
        raise RuntimeError(f"transformers=={installed} must be as 5.23 is, in its masks and its check of names")
    if not _registered:
        _admit()
    _registered.add(name)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    return name


def _admit() -> None:
    check, is_flash = PreTrainedModel._check_and_adjust_attn_implementation, masking_utils.is_flash_attention_requested

    @functools.wraps(check)
    def admit(self, attn_implementation, *args, **options):
        if attn_implementation not in _registered:
            return check(self, attn_implementation, *args, **options)
        if not self._can_set_attn_implementation():
            raise ValueError(
                f"attn_implementation={attn_implementation!r} must be 'eager' for {type(self).__name__}, "
                "which does not look its attention up by name"
            )
        return attn_implementation

    def asks_for_flash(config=None, *args, **options):
        return getattr(config, "_attn_implementation", None) not in _registered and is_flash(config, *args, **options)

    PreTrainedModel._check_and_adjust_attn_implementation = admit
    masking_utils.is_flash_attention_requested = asks_for_flash  # which would refuse a mask of chunks


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    deterministic: bool | None = None,
    **rest,
) -> tuple[Tensor, None]:
    """The attention of one layer: query [B, H, Sq, D], key and value [B, Hk, Sk, D] -> [B, Sq, H, Dv].

    The arguments are those that Transformers' models pass. `s_aux` are sinks [H].

    Raises:
        NotImplementedError: a sparse layer's `indices`, sinks that differ by token, a paged `cache`, or
            `output_attentions`: the weights are never in memory.
    """
    _check_the_rest(module, rest)
    by_length = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    dense, pattern = None, Pattern()
    if isinstance(attention_mask, Mask):
        pattern = attention_mask.pattern
    elif attention_mask is not None:
        dense = _dense(attention_mask)
    elif query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        pattern = Pattern(right=0)
        if not by_length:  # as sdpa has it: causal from the top left
            key, value, right = causal_from_top_left(query.shape[2], key, value)
            pattern = Pattern(right=right)
            position_bias = None if position_bias is None else position_bias[..., : key.shape[2]]
    if attention_mask is None and sliding_window is not None:  # a mask has the window in it
        pattern = pattern.within(sliding_window - 1, sliding_window - 1)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    ranges = _packed_by_length(q, k, cu_seq_lens_q, cu_seq_lens_k, pattern) if by_length else None
    if not by_length and dense is None and pattern.segment_ids is None:
        pattern = _packed_by_position(pattern, q, k, position_ids)
    options = Options(
        scale=scaling,
        left=-1 if by_length else pattern.left,
        right=-1 if by_length else pattern.right,
        softcap=softcap or 0.0,
        dropout_p=dropout,
        deterministic=bool(deterministic),
    )
    out, _ = attention(
        q,
        k,
        v,
        options,
        attn_mask=dense,
        bias=position_bias,
        segment_ids=pattern.segment_ids,
        sinks=s_aux,
        key_ranges=ranges,
    )
    return out, None


def _check_the_rest(module: torch.nn.Module, rest: dict) -> None:
    for name in ("cache", "indices", "block_indices", "sinks"):
        if rest.get(name) is not None:
            raise NotImplementedError(f"{name} of {type(module).__name__} must be None: not in the kernels")
    if rest.get("output_attentions"):
        raise NotImplementedError("output_attentions=True needs attn_implementation='eager'")


def _dense(mask: Tensor) -> Tensor:
    if mask.dim() != 4:
        raise ValueError(f"attention_mask.shape={list(mask.shape)} must have 4 axes")
    return mask


def _packed_by_position(pattern: Pattern, q: Tensor, k: Tensor, position_ids: Tensor | None) -> Pattern:
    """With the sequences that start where a position is 0.

    Where there is a cache, Transformers leaves it to flash attention to find them, in a batch of one.
    """
    if position_ids is None or not (1, k.shape[1]) == q.shape[:2] == position_ids.shape:
        return pattern
    ids = (position_ids == 0).cumsum(-1)
    if not torch.compiler.is_compiling() and ids[0, -1] <= 1:
        return pattern
    return pattern._replace(segment_ids=(ids, ids))


def _packed_by_length(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, pattern: Pattern) -> Tensor:
    """The key ranges of the sequences in a batch of one, within the pattern's limits."""
    if q.shape[0] != 1:
        raise ValueError(f"batch={q.shape[0]} must be 1 with cu_seq_lens_q")
    cu_q = _arguments.cu_seqlens("cu_seq_lens_q", cu_q, q[0], None)
    cu_k = _arguments.cu_seqlens("cu_seq_lens_k", cu_k, k[0], None)
    return key_ranges.packed(cu_q, cu_k, q.shape[1], pattern.left, pattern.right)

"""`import flash_attn` that finds these functions, for programs that cannot be changed. Opt-in."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from interop import bert_padding, flash_attn, kv_cache, modules, rotary, varlen

_FUNCTIONS = (
    flash_attn.flash_attn_func,
    flash_attn.flash_attn_kvpacked_func,
    flash_attn.flash_attn_qkvpacked_func,
    varlen.flash_attn_varlen_func,
    varlen.flash_attn_varlen_kvpacked_func,
    varlen.flash_attn_varlen_qkvpacked_func,
    kv_cache.flash_attn_with_kvcache,
)
_PADDING = (
    bert_padding.index_first_axis,
    bert_padding.index_put_first_axis,
    bert_padding.pad_input,
    bert_padding.unpad_input,
    bert_padding.unpad_input_for_concatenated_sequences,
)
_MODULES = {
    "flash_attn": _FUNCTIONS,
    "flash_attn.flash_attn_interface": _FUNCTIONS,
    "flash_attn.bert_padding": _PADDING,
    "flash_attn.layers": (),
    "flash_attn.layers.rotary": (rotary.apply_rotary_emb, rotary.RotaryEmbedding),
    "flash_attn.modules": (),
    "flash_attn.modules.mha": (
        modules.MHA,
        modules.FlashSelfAttention,
        modules.FlashCrossAttention,
        modules.get_alibi_slopes,
    ),
    "flash_attn.flash_attention": (modules.FlashAttention,),
}


def install_as_flash_attn() -> None:
    """Makes `import flash_attn` in this process find jflash's functions under the same names.

    Call it before anything imports flash_attn. It covers the functions, `bert_padding`, `layers.rotary` and
    `modules.mha`; any other import from flash_attn raises ImportError, as if it were not installed.

    Raises:
        RuntimeError: the real flash_attn is imported already, or is installed.
    """
    if getattr(sys.modules.get("flash_attn"), "__jflash__", False):
        return
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        raise RuntimeError("flash_attn is installed: install_as_flash_attn must not hide the real one")
    for name, members in _MODULES.items():
        module = ModuleType(name, "jflash under the name of flash_attn.")
        module.__dict__.update({member.__name__: member for member in members})
        module.__dict__.update(__jflash__=True, __path__=[], __version__="2.8.4")
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)

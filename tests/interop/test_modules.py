"""Modules, padding helpers, rotary embedding, and `import flash_attn` that finds them."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from interop import (
    MHA,
    FlashAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    RotaryEmbedding,
    apply_rotary_emb,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def normal(seed, *shape, grad=False):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def test_unpad_and_pad():
    x = normal(0, 3, 5, 2, 4, grad=True)
    packed, indices, cu_seqlens, longest, seqused = unpad_input(x, MASK, ~MASK & (torch.arange(5) == 4))
    assert cu_seqlens.tolist() == [0, 4, 5, 10]
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert (longest, seqused.tolist()) == (5, [3, 0, 5])
    kept = MASK | (torch.arange(5) == 4)
    assert torch.equal(packed, x[kept])
    back = pad_input(packed, indices, 3, 5)
    assert torch.equal(back, x * kept[:, :, None, None])
    weight = normal(1, 3, 5, 2, 4)
    (gradient,) = torch.autograd.grad(back, x, weight)
    assert torch.equal(gradient, weight * kept[:, :, None, None])


def test_rows_of_several_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = normal(2, 3, 6, 4)
    packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert longest == 6
    assert torch.equal(packed, x.flatten(0, 1)[indices])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    """As a product of complex numbers; and by sequence, with offsets, in place."""
    x = normal(3, 2, 7, 3, 16)
    angle = torch.outer(torch.arange(20), 100.0 ** -(torch.arange(6) / 6))
    offsets = torch.tensor([4, 0])
    found = apply_rotary_emb(x, angle.cos(), angle.sin(), interleaved, seqlen_offsets=offsets)
    turn = torch.exp(1j * angle)[offsets[:, None] + torch.arange(7)][:, :, None]
    a, b = (x[..., 0:12:2], x[..., 1:12:2]) if interleaved else (x[..., :6], x[..., 6:12])
    z = torch.complex(a, b) * turn
    pair = torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)
    torch.testing.assert_close(found, torch.cat([pair, x[..., 12:]], -1))
    packed = apply_rotary_emb(
        x.flatten(0, 1),
        angle.cos(),
        angle.sin(),
        interleaved,
        seqlen_offsets=offsets,
        cu_seqlens=torch.tensor([0, 7, 14]),
    )
    torch.testing.assert_close(packed, found.flatten(0, 1))
    assert apply_rotary_emb(x, angle.cos(), angle.sin(), interleaved, True, offsets) is x
    torch.testing.assert_close(x, found)


def test_rotary_module():
    qkv, module = normal(4, 2, 6, 3, 2, 8), RotaryEmbedding(8)
    found = module(qkv, seqlen_offset=3)
    assert torch.equal(found[:, :, 2], qkv[:, :, 2])
    later = module(torch.cat([qkv[:, :3], qkv], dim=1))
    torch.testing.assert_close(found, later[:, 3:])
    with pytest.raises(ValueError, match="needs max_seqlen"):
        module(qkv, torch.tensor([1, 2]))


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_with_key_padding(causal):
    """0 at padding, and else as of the tokens alone."""
    qkv, module = normal(5, 3, 5, 3, 2, 8), FlashAttention(softmax_scale=0.4, causal=causal)
    out = module(qkv, MASK)
    assert (out[~MASK] == 0).all()
    for b in (0, 2):
        alone = flash_attn_qkvpacked_func(qkv[b : b + 1, MASK[b]], softmax_scale=0.4, causal=causal)
        torch.testing.assert_close(out[b, MASK[b]], alone[0])
    torch.testing.assert_close(module(qkv), flash_attn_qkvpacked_func(qkv, softmax_scale=0.4, causal=causal))


def test_dropout_in_training_only():
    qkv, module = normal(6, 1, 40, 3, 2, 8), FlashSelfAttention(attention_dropout=0.5)
    assert not torch.equal(module(qkv), module(qkv))
    module.eval()
    assert torch.equal(module(qkv), flash_attn_qkvpacked_func(qkv))


def test_inner_modules():
    q, k, v = (normal(7 + n, 2, 9, h, 8) for n, h in enumerate((4, 2, 2)))
    kv, cu = torch.stack([k, v], dim=2), torch.tensor([0, 9, 18], dtype=torch.int32)
    module = FlashCrossAttention(causal=True, window_size=(4, -1))
    expected = flash_attn_func(q, k, v, causal=True, window_size=(4, -1))
    torch.testing.assert_close(module(q, kv), expected)
    packed = module(q.flatten(0, 1), kv.flatten(0, 1), None, cu, 9, cu, 9)
    torch.testing.assert_close(packed, expected.flatten(0, 1))
    torch.testing.assert_close(module(q, kv, causal=False), flash_attn_func(q, k, v, window_size=(4, -1)))


def test_mha_is_torchs():
    """nn.MultiheadAttention with the same weights, output and gradients."""
    ours, x = MHA(32, 4), normal(10, 2, 11, 32)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.Wqkv.weight)
        theirs.in_proj_bias.copy_(ours.Wqkv.bias)
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
        theirs.out_proj.bias.copy_(ours.out_proj.bias)
    expected, weight = theirs(x, x, x, need_weights=False)[0], normal(11, 2, 11, 32)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    (g,) = torch.autograd.grad(ours(x), ours.Wqkv.weight, weight)
    (h,) = torch.autograd.grad(expected, theirs.in_proj_weight, weight)
    torch.testing.assert_close(g, h, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", [{"rotary_emb_dim": 8}, {"use_alibi": True}, {"window_size": (3, 0)}], ids=str)
def test_mha_generates_what_it_computes(positions):
    """Token by token with a cache, as all at once."""
    module, x = MHA(32, 4, num_heads_kv=2, causal=True, **positions).eval(), normal(12, 2, 9, 32)
    with torch.no_grad():
        expected, cache = module(x), module.allocate_inference_cache(2, 16)
        steps = [module(x[:, i : i + 1], cache=cache, cache_seqlens=i) for i in range(9)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_mha_in_half_precision_keeps_its_slopes():
    x, module = normal(12, 2, 9, 32), MHA(32, 4, causal=True, use_alibi=True)
    expected = module(x)
    torch.testing.assert_close(module.bfloat16()(x.bfloat16()).float(), expected, atol=0.03, rtol=0.03)


def test_mha_padding_and_cross_attention():
    x, module = normal(13, 3, 5, 32), MHA(32, 4, causal=True, rotary_emb_dim=8)
    padded = module(x, key_padding_mask=MASK)
    torch.testing.assert_close(padded[2], module(x)[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[0, :2], module(x)[0, :2], atol=1e-5, rtol=1e-5)
    cross = MHA(32, 4, num_heads_kv=1, cross_attn=True)
    assert cross(x, normal(14, 3, 8, 32)).shape == x.shape
    with pytest.raises(ValueError, match="x_kv must be given with cross_attn=True"):
        cross(x)
    with pytest.raises(ValueError, match="only one of"):
        module(x, key_padding_mask=MASK, cache=module.allocate_inference_cache(3, 8))


def run(program: str) -> str:
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_import_flash_attn():
    program = """
import interop
interop.install_as_flash_attn()
interop.install_as_flash_attn()
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.modules.mha import MHA, FlashSelfAttention
import flash_attn.ops
"""
    with pytest.raises(AssertionError, match=r"No module named 'flash_attn\.ops'"):
        run(program)
    assert run(program.replace("import flash_attn.ops", "print(flash_attn_func is interop.flash_attn_func)")) == "True"


def test_the_real_flash_attn_is_not_hidden(tmp_path):
    (tmp_path / "flash_attn.py").write_text("")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport interop\ninterop.install_as_flash_attn()"
    with pytest.raises(AssertionError, match="must not hide the real one"):
        run(program)

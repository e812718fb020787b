"""The seed TorchSharp.FlashAttention: what its README shows, in Python, and what its C# gets wrong."""

import pytest

torch = pytest.importorskip("torch")

import interop  # noqa: E402
from interop import FlashAttention, flash_attn_qkvpacked_func  # noqa: E402

INTERFACE = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
)


@pytest.mark.parametrize("name", INTERFACE)
def test_every_function_of_the_readme_is_here(name):
    assert callable(getattr(interop, name))


def expected(qkv, scale, causal=False):
    q, k, v = (x.transpose(1, 2).float() for x in qkv.unbind(2))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.transpose(1, 2)


def test_example_of_the_interface():
    torch.manual_seed(0)
    batch_size, seqlen, headdim, nheads = 5, 12, 32, 4
    qkv = torch.rand(batch_size, seqlen, 3, nheads, headdim).half()
    if torch.cuda.is_available():
        qkv = qkv.cuda()
    out = flash_attn_qkvpacked_func(qkv)
    assert out.shape == (batch_size, seqlen, nheads, headdim)
    torch.testing.assert_close(out.float(), expected(qkv, headdim**-0.5), atol=1e-3, rtol=1e-3)
    out, lse, _ = flash_attn_qkvpacked_func(qkv, return_attn_probs=True)  # which the C# cannot without dropout
    assert lse.shape == (batch_size, nheads, seqlen)


class MyModule(torch.nn.Module):
    """The README's, with projections for the rest of its fields."""

    def __init__(self):
        super().__init__()
        self.flash = FlashAttention(softmax_scale=1, attention_dropout=0.1, causal=True)
        self.Wqkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, input, key_padding_mask):
        qkv = self.Wqkv(input).unflatten(-1, (3, 2, 8))
        return self.out(self.flash(qkv, key_padding_mask).flatten(-2))


def test_example_of_the_module():
    """Without dropout: each row is causal attention of its own tokens, and the bias of `out` at its padding."""
    torch.manual_seed(1)
    module, x = MyModule().eval(), torch.randn(3, 6, 16)
    lengths = [6, 0, 4]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    found = module(x, mask)
    for row, n, out in zip(x, lengths, found, strict=True):
        qkv = module.Wqkv(row[None, :n]).unflatten(-1, (3, 2, 8))
        own = module.out(expected(qkv, 1.0, causal=True).flatten(-2))[0]
        torch.testing.assert_close(out[:n], own, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out[n:], module.out.bias.expand(6 - n, 16))


def test_module_drops_out_in_training_only():
    torch.manual_seed(2)
    module, x, mask = MyModule(), torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.bool)
    first = module(x, mask)
    assert not torch.equal(first, module(x, mask))
    module.eval()
    assert torch.equal(module(x, mask), module(x, mask))


def test_a_cache_of_one_sequence():
    """cache_seqlens of one element and an integer, neither of which the C# takes."""
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 1, 4, 16), torch.randn(1, 9, 4, 16), torch.randn(1, 9, 4, 16)
    out = interop.flash_attn_func(q, k[:, :7], v[:, :7])
    for seqlens in (7, torch.tensor([7], dtype=torch.int32)):
        found = interop.flash_attn_with_kvcache(q, k.clone(), v.clone(), cache_seqlens=seqlens)
        torch.testing.assert_close(found, out)

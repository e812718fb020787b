"""flash_attn_varlen_func and its packed forms: bits of the JAX function, autograd, torch's own attention."""

import itertools

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import jflash
from interop import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tests.interop.cases import assert_follows, cotangent, gradients

LENGTHS = [7, 0, 19, 1, 12]


def cu_seqlens(lengths=LENGTHS) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed(seed, T=39, H=4, Hk=2, D=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn((T, h, D), generator=g, dtype=dtype).requires_grad_() for h in (H, Hk, Hk)]


SLOPES = torch.rand((5, 4), generator=torch.Generator().manual_seed(0))
OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "everything": (
        {"window_size": (5, 2), "softcap": 2.0, "softmax_scale": 0.4, "alibi_slopes": SLOPES[0]},
        {"window": (5, 2), "softcap": 2.0, "scale": 0.4, "alibi_slopes": SLOPES[0].numpy()},
    ),
    "slopes by sequence": (
        {"causal": True, "alibi_slopes": SLOPES},
        {"causal": True, "alibi_slopes": SLOPES.numpy()},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_same_bits_as_jax(name):
    options, jax_options = OPTIONS[name]
    tensors, cu = packed(1), cu_seqlens()
    out, lse, nothing = flash_attn_varlen_func(*tensors, cu, cu, 19, 19, **options, return_attn_probs=True)
    assert nothing is None
    ours = [out, lse, *gradients([out, lse], tensors)]
    arrays = [jnp.asarray(x.detach().numpy()) for x in tensors]

    def f(*arrays):
        return jflash.flash_attention_varlen(
            *arrays, cu_seqlens_q=cu.numpy(), cu_seqlens_k=cu.numpy(), return_lse=True, **jax_options
        )

    results, pull = jax.vjp(f, *arrays)
    weights = tuple(jnp.asarray(cotangent(torch.empty(x.shape), seed).numpy()) for seed, x in enumerate(results))
    for x, y in zip(ours, (*results, *pull(weights)), strict=True):
        torch.testing.assert_close(x.detach(), torch.tensor(jax.device_get(y)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_torch_sequence_by_sequence(dtype):
    tensors, cu = packed(2, dtype=dtype), cu_seqlens()

    def torchs(tensors):
        outs = []
        for q, k, v in zip(*(x.split(LENGTHS) for x in tensors), strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            outs.append(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outs)

    def results(f, tensors):
        out = f(tensors)
        return [out, *gradients(out, tensors)]

    ours = results(lambda t: flash_attn_varlen_func(*t, cu, cu, 19, 19, causal=True), tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    assert_follows(("out", "dq", "dk", "dv"), ours, results(torchs, tensors), results(torchs, wide), dtype)


def test_positional_arguments_are_flash_attns():
    tensors, cu = packed(3), cu_seqlens()
    named = flash_attn_varlen_func(*tensors, cu, cu, softmax_scale=0.3, causal=True, window_size=(6, -1), softcap=2.0)
    assert torch.equal(named, flash_attn_varlen_func(*tensors, cu, cu, 19, 19, 0.0, 0.3, True, (6, -1), 2.0))


@pytest.mark.parametrize("form", ["qkv", "kv"])
def test_packed_forms_have_one_gradient(form):
    (q, _, _), cu = packed(4), cu_seqlens()
    if form == "qkv":
        x = torch.randn(39, 3, 4, 16, generator=torch.Generator().manual_seed(5), requires_grad=True)
        out = flash_attn_varlen_qkvpacked_func(x, cu, 19, causal=True)
        plain = flash_attn_varlen_func(*x.unbind(1), cu, cu, causal=True)
    else:
        x = torch.randn(39, 2, 2, 16, generator=torch.Generator().manual_seed(6), requires_grad=True)
        out = flash_attn_varlen_kvpacked_func(q, x, cu, cu, 19, 19, causal=True)
        plain = flash_attn_varlen_func(q, *x.unbind(1), cu, cu, causal=True)
    assert torch.equal(out, plain)
    (gradient,) = gradients(out, [x])
    assert gradient.shape == x.shape
    assert torch.equal(gradient, gradients(plain, [x])[0])


def test_dropout_repeats_with_the_seed():
    tensors, cu = packed(7), cu_seqlens()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(flash_attn_varlen_func(*tensors, cu, cu, dropout_p=0.3))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_lengths_change_without_a_new_program():
    """How many sequences there are, and how long, is data: as many tokens run what is compiled."""
    from interop.kernels import programs

    q, k, v = packed(8)
    flash_attn_varlen_func(q, k, v, cu := cu_seqlens(), cu, causal=True).sum().backward()
    before = programs.total()
    for lengths in ([39, 0, 0, 0, 0], [1, 2, 3, 4, 5], [20, 19], [3] * 13):
        flash_attn_varlen_func(q, k, v, cu := cu_seqlens(lengths), cu, causal=True).sum().backward()
    assert programs.total() == before


def test_tokens_padded_to_a_round_number():
    """Other totals are padded; the results are those of exact shapes."""
    for T in (39, 41, 50):
        tensors, cu = packed(9, T=T), cu_seqlens([20, 0, 13, 0, 6])
        ours = flash_attn_varlen_func(*tensors, cu, cu, causal=True, alibi_slopes=SLOPES)
        first = [x[:20][None] for x in tensors]
        alone = flash_attn_func(*first, causal=True, alibi_slopes=SLOPES[0])
        torch.testing.assert_close(ours[:20], alone[0], atol=1e-5, rtol=1e-5)
        assert (ours[39:] == 0).all()


def test_compile():
    tensors, cu = packed(10), cu_seqlens()
    attend = lambda q, k, v, cu: flash_attn_varlen_func(q, k, v, cu, cu, 19, 19, causal=True) * 2  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors, cu)
    eager = attend(*tensors, cu)
    assert torch.equal(compiled, eager)
    for x, y in zip(gradients(compiled, tensors), gradients(eager, tensors), strict=True):
        assert torch.equal(x, y)


def test_vmap():
    both = [torch.stack(pair).detach() for pair in zip(packed(11), packed(12), strict=True)]
    cu = torch.stack([cu_seqlens([39, 0]), cu_seqlens([9, 30])])
    out = torch.func.vmap(lambda q, k, v, cu: flash_attn_varlen_func(q, k, v, cu, cu, causal=True))(*both, cu)
    for n in range(2):
        one = flash_attn_varlen_func(*(x[n] for x in both), cu[n], cu[n], causal=True)
        torch.testing.assert_close(out[n], one)


CU = cu_seqlens()
ERRORS = {
    "dtype": ({"cu_seqlens_q": CU.float()}, TypeError, "cu_seqlens_q.dtype=torch.float32 must be torch.int32 or"),
    "axes": ({"cu_seqlens_q": CU[None]}, ValueError, r"cu_seqlens_q.shape=\[1, 6\] must be \[N \+ 1\]"),
    "falls": (
        {"cu_seqlens_k": torch.tensor([0, 9, 7, 8, 9, 39])},
        ValueError,
        r"=\[0, 9, 7, 8, 9, 39\] must start at 0",
    ),
    "total": ({"cu_seqlens_k": CU + torch.arange(6)}, ValueError, "end at 39 or before"),
    "longest": ({"max_seqlen_q": torch.tensor(18)}, ValueError, "max_seqlen=18 must be >= 19, the longest of cu"),
    "counts": ({"cu_seqlens_k": CU[:3]}, ValueError, r"\[6\] and \[3\] must be equal"),
    "batched": ({"q": torch.zeros(1, 39, 4, 16)}, ValueError, r"must have 3 axes: \[tokens, heads, dim\]"),
    "slopes": ({"alibi_slopes": SLOPES[:3]}, ValueError, r"alibi_slopes.shape=\[3, 4\] must be"),
    "table": ({"block_table": torch.zeros(5, 1)}, ValueError, r"k.shape=\[39, 2, 16\] must have 4 axes: \[pages"),
}


def pages(seed, size, lengths=LENGTHS):
    """Keys and values packed, and the same in pages in random order, NaN where nothing is, with their table."""
    _, k, v = (x.detach() for x in packed(seed, T=sum(lengths)))
    n = -(-max(lengths) // size)
    table = torch.randperm(3 * len(lengths) * n, generator=torch.Generator().manual_seed(seed))[: len(lengths) * n]
    table = table.view(-1, n).int()
    found = [torch.full((3 * table.numel(), size, *x.shape[1:]), torch.nan) for x in (k, v)]
    for row, *parts in zip(table, k.split(lengths), v.split(lengths), strict=True):
        for x, part in zip(found, parts, strict=True):
            for page, piece in zip(row, part.split(size), strict=False):
                x[page, : len(piece)] = piece
    return (k, v), [x.requires_grad_() for x in found], table


@pytest.mark.parametrize("longest", [None, torch.tensor(19)])
@pytest.mark.parametrize("size", [1, 8, 256])
def test_pages(size, longest):
    """The same attention as of packed keys, and gradients where the keys lie."""
    q, cu = packed(14)[0], cu_seqlens()
    whole, (k, v), table = pages(15, size)
    expected = flash_attn_varlen_func(q, *whole, cu, cu, 19, longest, causal=True)
    out = flash_attn_varlen_func(q, k, v, cu, cu, 19, longest, causal=True, block_table=table)
    torch.testing.assert_close(out, expected)
    weight = cotangent(out, 16)
    (expected,) = torch.autograd.grad(flash_attn_varlen_func(q, *whole, cu, cu, causal=True), q, weight)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), weight)
    torch.testing.assert_close(dq, expected)
    for x, dx in ((k, dk), (v, dv)):
        assert torch.isfinite(dx).all()
        assert not dx[x.isnan()].any()
        assert dx[~x.isnan()].all()


PAGE_ERRORS = {
    "room": (lambda table: table[:, :2], r"has 19 keys, the table room for 16"),
    "rows": (lambda table: table.clone().fill_(10**6), r"of block_table must be in \[0, 45\)"),
    "counts": (lambda table: table[:3], r"block_table.shape=\[3, 3\] must be \[N, pages\] with N=5"),
}


@pytest.mark.parametrize("name", PAGE_ERRORS)
def test_page_errors(name):
    change, message = PAGE_ERRORS[name]
    _, (k, v), table = pages(17, 8)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(packed(18)[0], k, v, CU, CU, block_table=change(table))


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changed, error, message = ERRORS[name]
    q, k, v = packed(13)
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**{"q": q, "k": k, "v": v, "cu_seqlens_q": CU, "cu_seqlens_k": CU, **changed})

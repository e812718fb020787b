"""Changing lengths: few programs, the same results."""

import itertools
import random
import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from interop import flash_attn_func, flash_attn_varlen_func, lengths, ops
from interop.attention import attention
from interop.operands import Operands, Options
from tests.interop.cases import Recorded, by_definition, by_jax, dropout_key, gradients, qkv

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
NAMES = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")


def programs(direction: str, before) -> int:
    """Compiled since `before`."""
    found = ops.kernels().programs - before
    return sum(n for (d, _), n in found.items() if d == direction)


@pytest.fixture
def others_came_first(monkeypatch):
    """No call runs as it is."""

    class Others(dict):
        def setdefault(self, kind, exact):
            return None

    monkeypatch.setattr(lengths, "first", Others())


def test_fifty_lengths_compile_eight_programs():
    found = random.Random(0).sample(range(1, 4097), 50)
    before = ops.kernels().programs.copy()
    for n in found:
        tensors = qkv(0, B=1, H=1, Hk=1, D=8, Sq=n)
        out = flash_attn_func(*tensors, causal=True)
        expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), is_causal=True)
        torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
        if n < 600:
            gradients(out, tensors)
    assert max(found) > 2048
    assert 2 < programs("forward", before) <= 8
    assert 2 < programs("backward", before) <= 8


def test_a_growing_cache_compiles_eight_programs():
    """One query at a time, with and without a window."""
    for window in (-1, 40):
        before = ops.kernels().programs.copy()
        for n in range(1, 300, 23):
            q, _, _ = qkv(1, B=1, Sq=1, D=8, grad=False)
            _, k, v = qkv(2, B=1, Sq=n, D=8, grad=False)
            out = flash_attn_func(q, k, v, window_size=(window, 0))
            last = slice(None) if window < 0 else slice(-41, None)
            q, k, v = (x.transpose(1, 2) for x in (q, k[:, last], v[:, last]))
            expected = scaled_dot_product_attention(q, k, v, enable_gqa=True)
            torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
        assert programs("forward", before) <= 5


def everything(Sq, Sk, seed=3, dtype=torch.float32):
    """q, k, v, a bias and sinks; what JAX takes besides them."""
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(1, 4, Sq, Sk, generator=g, dtype=dtype).requires_grad_()
    sinks = torch.randn(4, generator=g, dtype=dtype).requires_grad_()
    mask = torch.rand(2, 1, 1, Sk, generator=g) < 0.8
    ids = [torch.randint(3, (2, n), generator=g) for n in (Sq, Sk)]
    return [*qkv(seed, dtype, Sq=Sq, Sk=Sk), bias, sinks], mask, ids


def attend(tensors, mask, ids, options):
    q, k, v, bias, sinks = tensors
    outputs = attention(q, k, v, options, bias=bias, sinks=sinks, attn_mask=mask, segment_ids=ids, alibi_slopes=SLOPES)
    return [*outputs, *gradients(outputs, tensors)]


@pytest.mark.parametrize(
    ("Sq", "Sk", "options"),
    [
        (37, 53, Options(right=0)),
        (70, 21, Options(left=20, right=3, softcap=2.0)),
        (21, 70, Options(left=20, dropout_p=0.3)),
    ],
    ids=["causal", "window", "dropout"],
)
def test_padding_moves_nothing(Sq, Sk, options, others_came_first):
    """Every operand at once, positions counted from the bottom right, the same dropout mask."""
    tensors, mask, ids = everything(Sq, Sk)
    key = dropout_key(4)
    before = ops.kernels().programs.copy()
    ours = attend(tensors, mask, ids, options)
    assert all(kind.key_ranges for _, kind in ops.kernels().programs - before)
    expected = by_jax(
        tensors, ["bias", "sinks"], mask=mask.numpy(), segment_ids=[x.int().numpy() for x in ids],
        window=(options.left, options.right), softcap=options.softcap or None,
        dropout_rate=options.dropout_p, dropout_key=key if options.dropout_p else None, alibi_slopes=SLOPES.numpy(),
    )  # fmt: skip
    for name, x, y in zip(NAMES, ours, expected, strict=True):
        assert x.is_contiguous(), name
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("Sq", "Sk"), [(64, 64), (1, 128)])
def test_powers_of_two_have_the_bits_of_jax(Sq, Sk, others_came_first):
    tensors = qkv(6, D=24, Sq=Sq, Sk=Sk)
    outputs = flash_attn_func(*tensors, causal=True, return_attn_probs=True)[:2]
    ours = [*outputs, *gradients(outputs, tensors)]
    for name, x, y in zip(NAMES, ours, by_jax(tensors, causal=True), strict=False):
        assert torch.equal(x, y), name


def test_exact_lengths_on_request(exact_lengths):
    """Then every length has the bits of JAX, and a program of its own."""
    before = ops.kernels().programs.copy()
    for n in (33, 47):
        tensors = qkv(7, B=3, D=8, Sq=n)
        outputs = flash_attn_func(*tensors, causal=True, return_attn_probs=True)[:2]
        ours = [*outputs, *gradients(outputs, tensors)]
        for name, x, y in zip(NAMES, ours, by_jax(tensors, causal=True), strict=False):
            assert torch.equal(x, y), name
    assert (programs("forward", before), programs("backward", before)) == (2, 2)


def test_many_shapes_warn_once(monkeypatch):
    kernels = ops.kernels()
    assert kernels.MANY == 16
    monkeypatch.setattr(kernels, "MANY", 3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for B in range(1, 6):
            flash_attn_func(*qkv(8, B=B, Sq=4, D=4, grad=False), softmax_scale=0.123)
    messages = [str(w.message) for w in seen if "has compiled" in str(w.message)]
    assert len(messages) == 1
    assert "3 programs for attention forwards that differ in their shapes only" in messages[0]
    assert "B=3, Sq=4, Sk=4" in messages[0]
    assert "pad batches to a few sizes" in messages[0]


@pytest.mark.parametrize(
    ("target", "dtype", "Sq", "takes"),
    [
        ("sm_90", torch.bfloat16, 300, True),
        ("sm_80", torch.bfloat16, 310, False),
        ("sm_80", torch.bfloat16, 8, True),
        ("sm_80", torch.float32, 300, True),
    ],
)
def test_a_faster_backend_is_not_given_up_but_for_few_queries(monkeypatch, target, dtype, Sq, takes):
    """Where cuDNN takes the call, which wants its lengths known, it is compiled for them."""
    kernels = ops.kernels()
    monkeypatch.setattr(kernels.backends, "target_of", lambda x: target)
    operands = Operands(*qkv(9, dtype, Sq=Sq, Sk=302, D=64, grad=False))
    assert kernels.takes_lengths(operands, Options()) == takes


def test_nothing_of_it_shows_in_the_operators(others_came_first):
    """Tracing sees one call on the tensors as they are."""
    tensors = qkv(10, Sq=50, D=8, grad=False)
    with Recorded() as recorded:
        flash_attn_func(*tensors)
    ((q, *_),) = recorded.calls
    assert q.shape == (2, 50, 4, 8)


def test_packed_batches_compile_few_programs():
    """Other totals and other numbers of sequences, forward and backward."""
    g = torch.Generator().manual_seed(11)
    before = ops.kernels().programs.copy()
    for _ in range(8):
        lengths = torch.randint(1, 30, (int(torch.randint(2, 9, (), generator=g)),), generator=g)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        tensors = [x[0].detach().requires_grad_() for x in qkv(12, B=1, Sq=int(starts[-1]), D=8)]
        out = flash_attn_varlen_func(*tensors, starts, starts, causal=True)
        each = [
            by_definition(*(x[None, i:j] for x in tensors), right=0)[0][0]
            for i, j in itertools.pairwise(starts.tolist())
        ]
        expected = torch.cat(each)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        for x, y in zip(gradients(out, tensors), gradients(expected, tensors), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert programs("forward", before) <= 6
    assert programs("backward", before) <= 6

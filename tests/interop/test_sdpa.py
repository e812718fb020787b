"""interop.scaled_dot_product_attention against torch's own."""

import pytest
import torch
from torch.nn import functional

from interop import scaled_dot_product_attention
from interop.operands import TENSORS, Operands
from tests.interop.cases import Recorded, assert_follows, by_jax, dropout_key, gradients, qkv


def heads_first(tensors):
    """[B, S, H, D] -> [B, H, S, D] with memory of its own."""
    return [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors]


# lengths, key/value heads, options
CASES = {
    "plain": ((17, 29), 4, {}),
    "causal": ((21, 21), 4, {"is_causal": True}),
    "causal_more_keys": ((17, 29), 4, {"is_causal": True}),
    "causal_fewer_keys": ((29, 17), 4, {"is_causal": True, "scale": 0.9}),
    "grouped": ((17, 29), 2, {"enable_gqa": True, "scale": 0.3}),
}


def check(ours, reference, tensors):
    """Outputs and gradients of all tensors, by the rule of `tests.oracle`."""
    wide = [x.detach().double().requires_grad_() for x in tensors]
    results = []
    for f, inputs in ((ours, tensors), (reference, tensors), (reference, wide)):
        out = f(*inputs)
        results.append([out, *gradients(out, inputs)])
    assert_follows(("out", "dq", "dk", "dv", "dmask")[: len(results[0])], *results, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_matches_torch(name):
    (L, S), Hk, options = CASES[name]
    check(
        lambda *t: scaled_dot_product_attention(*t, **options),
        lambda *t: functional.scaled_dot_product_attention(*t, **options),
        heads_first(qkv(0, Sq=L, Sk=S, Hk=Hk, Dv=24)),
    )


@pytest.mark.parametrize("shape", [(17, 29), (4, 1, 29), (2, 1, 17, 29)], ids=str)
def test_float_mask_is_added_and_has_a_gradient(shape):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    tensors = heads_first(qkv(1, Sq=17, Sk=29, Hk=4))
    check(
        lambda q, k, v, m: scaled_dot_product_attention(q, k, v, attn_mask=m),
        lambda q, k, v, m: functional.scaled_dot_product_attention(q, k, v, attn_mask=m),
        [*tensors, mask],
    )


@pytest.mark.parametrize("lead", [(), (2, 3, 4)], ids=str)
def test_any_number_of_axes(lead):
    """The mask broadcasts over the first of them."""
    g = torch.Generator().manual_seed(3)
    shapes = (*lead, 17, 8), (*lead, 29, 8), (*lead, 29, 8), (*lead[1:2], *lead[2:], 17, 29)
    check(
        lambda q, k, v, m: scaled_dot_product_attention(q, k, v, m),
        lambda q, k, v, m: functional.scaled_dot_product_attention(q, k, v, m),
        [torch.randn(shape, generator=g).requires_grad_() for shape in shapes],
    )


@pytest.mark.parametrize("shape", [(17, 29), (2, 1, 1, 29)], ids=str)
def test_bool_mask_hides(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[..., 0, 3] = True
    check(
        lambda *t: scaled_dot_product_attention(*t, attn_mask=mask),
        lambda *t: functional.scaled_dot_product_attention(*t, attn_mask=mask),
        heads_first(qkv(2, Sq=17, Sk=29, Hk=4)),
    )


def test_row_without_keys_is_zero():
    q, k, v = heads_first(qkv(3, Hk=4))
    mask = torch.ones(21, 21, dtype=torch.bool)
    mask[5] = False
    out = scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(out[:, :, 5], torch.zeros(2, 4, 16))
    dq, dk, dv = gradients(out, (q, k, v))
    assert torch.equal(dq[:, :, 5], torch.zeros(2, 4, 16))
    assert torch.isfinite(dk).all()
    assert torch.isfinite(dv).all()


def test_half_precision_takes_a_float32_mask():
    q, k, v = heads_first(qkv(4, torch.bfloat16, Hk=4))
    mask = torch.randn(21, 21)
    out = scaled_dot_product_attention(q, k, v, mask)
    expected = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


def test_same_bits_as_jax(exact_lengths):
    """With a mask that is a bias, its gradient, and dropout."""
    tensors = qkv(5, Hk=4)
    bias = torch.randn(1, 4, 21, 21, requires_grad=True)
    key = dropout_key(6)
    q, k, v = (x.transpose(1, 2) for x in tensors)
    out = scaled_dot_product_attention(q, k, v, bias, 0.25).transpose(1, 2)
    ours = [out, *gradients(out, [*tensors, bias])]
    expected = by_jax([*tensors, bias], ["bias"], outputs=1, dropout_rate=0.25, dropout_key=key)
    for name, x, y in zip(("out", "dq", "dk", "dv", "dbias"), ours, expected, strict=True):
        assert torch.equal(x, y), name


def test_transposed_inputs_are_not_copied():
    """[B, H, L, E] views of [B, L, H, E] memory reach the operator as that memory."""
    tensors = qkv(7, Hk=4, grad=False)
    with Recorded() as recorded:
        scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors))
    ((q, k, v, *_),) = recorded.calls
    assert [(x.data_ptr(), x.is_contiguous()) for x in (q, k, v)] == [(x.data_ptr(), True) for x in tensors]


def test_expanded_masks_are_not_copied():
    """As Transformers makes them: one mask for the whole batch."""
    mask = torch.rand(1, 1, 17, 29, generator=torch.Generator().manual_seed(8)) < 0.6
    tensors = [x.detach() for x in heads_first(qkv(8, Sq=17, Sk=29, Hk=4))]
    with Recorded() as recorded:
        out = scaled_dot_product_attention(*tensors, attn_mask=mask.expand(2, 4, -1, -1))
    found = Operands(*recorded.calls[0][:TENSORS]).mask
    assert (found.shape, found.data_ptr()) == (mask.shape, mask.data_ptr())
    expected = functional.scaled_dot_product_attention(*tensors, attn_mask=mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

"""flash_attn_func and the packed forms: values and gradients."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from interop import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from interop.attention import attention
from interop.operands import Options
from tests.interop.cases import (
    Recorded,
    assert_follows,
    by_definition,
    by_jax,
    dropout_key,
    gradients,
    qkv,
)

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
NAMES = ("out", "lse", "dq", "dk", "dv")

# name: (dtype, shape, our options, JAX's)
SAME = {
    "float32": (torch.float32, {"Sq": 37, "Sk": 53}, {}, {}),
    "bfloat16": (torch.bfloat16, {}, {"causal": True}, {"causal": True}),
    "float16": (torch.float16, {"Dv": 24}, {"softmax_scale": 0.7}, {"scale": 0.7}),
    "float64": (torch.float64, {}, {"causal": True}, {"causal": True}),
    "everything": (
        torch.float32,
        {"Sq": 30, "Sk": 41, "Hk": 1},
        {"causal": True, "window_size": (9, -1), "softcap": 3.0, "alibi_slopes": SLOPES},
        {"causal": True, "window": (9, None), "softcap": 3.0, "alibi_slopes": SLOPES.numpy()},
    ),
    "slopes_by_batch": (
        torch.float32,
        {"Sq": 9},
        {"alibi_slopes": torch.stack([SLOPES, SLOPES * 3])},
        {"alibi_slopes": np.stack([SLOPES, SLOPES * 3])},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_same_bits_as_jax(name, exact_lengths):
    dtype, shape, options, jax_options = SAME[name]
    tensors = qkv(1, dtype, **shape)
    out, lse, _ = flash_attn_func(*tensors, **options, return_attn_probs=True)
    ours = [out, lse, *gradients([out, lse], tensors)]
    for name, x, y in zip(NAMES, ours, by_jax(tensors, **jax_options), strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "Hk"), [(torch.float32, 2), (torch.bfloat16, 4), (torch.float16, 1)])
def test_matches_torch(dtype, causal, Hk):
    tensors = qkv(2, dtype, Sq=33, Hk=Hk)

    def torchs(tensors):
        q, k, v = (x.transpose(1, 2) for x in tensors)
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    def results(f, tensors):
        out = f(tensors)
        return [out, *gradients(out, tensors)]

    ours = results(lambda t: flash_attn_func(*t, causal=causal), tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    assert ours[0].dtype == dtype
    assert ours[0].is_contiguous()
    assert_follows(("out", "dq", "dk", "dv"), ours, results(torchs, tensors), results(torchs, wide), dtype)


OPTIONS = {
    "causal": ({"causal": True}, {"right": 0}),
    "window": ({"window_size": (3, 5), "softmax_scale": 1.3}, {"left": 3, "right": 5, "scale": 1.3}),
    "left_only": ({"window_size": (4, -1), "softcap": 2.0}, {"left": 4, "softcap": 2.0}),
    "causal_window": (
        {"causal": True, "window_size": (6, 9), "alibi_slopes": SLOPES},
        {"left": 6, "right": 0, "alibi_slopes": SLOPES},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", [(17, 29), (29, 17)], ids=["more_keys", "fewer_keys"])
def test_matches_definition(name, lengths):
    """Also where queries see no key: there out is 0, lse -inf, and no gradient."""
    ours, formula = OPTIONS[name]
    tensors = qkv(4, Sq=lengths[0], Sk=lengths[1])
    out, lse, _ = flash_attn_func(*tensors, **ours, return_attn_probs=True)

    def results(outputs, tensors):
        outputs = [outputs[0], outputs[1].masked_fill(outputs[1] == -torch.inf, 0)]
        return [*outputs, *gradients(outputs, tensors)]

    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = by_definition(*wide, **formula)
    assert torch.equal(lse == -torch.inf, expected[1] == -torch.inf)
    low = results(by_definition(*tensors, **formula), tensors)
    assert_follows(NAMES, results((out, lse), tensors), low, results(expected, wide), torch.float32)


def test_dropout_is_jax_dropout_with_the_drawn_key(exact_lengths):
    tensors = qkv(6)
    key = dropout_key(7)
    out, lse, _ = flash_attn_func(*tensors, dropout_p=0.3, return_attn_probs=True)
    ours = [out, lse, *gradients([out, lse], tensors)]
    for name, x, y in zip(NAMES, ours, by_jax(tensors, dropout_rate=0.3, dropout_key=key), strict=True):
        assert torch.equal(x, y), name


def test_dropout_follows_torch_seed():
    q, k, v = qkv(8, grad=False)
    torch.manual_seed(1)
    first, second = (flash_attn_func(q, k, v, 0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(flash_attn_func(q, k, v, 0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    flash_attn_func(q, k, v)
    assert torch.equal(torch.get_rng_state(), state), "drew a seed without dropout"


def test_operands_that_flash_attn_lacks(exact_lengths):
    """A mask, a bias, segments and sinks in one call, with the gradients of the bias and the sinks."""
    tensors = qkv(13, Sq=17, Sk=29)
    g = torch.Generator().manual_seed(14)
    bias = torch.randn(1, 4, 17, 29, generator=g).requires_grad_()
    sinks = torch.randn(4, generator=g).requires_grad_()
    mask = torch.rand(2, 1, 1, 29, generator=g) < 0.8
    segment_ids = [torch.randint(3, (2, length), generator=g) for length in (17, 29)]
    everything = [*tensors, bias, sinks]
    outputs = attention(
        *tensors, Options(left=20, right=3), bias=bias, attn_mask=mask, segment_ids=segment_ids, sinks=sinks
    )
    ours = [*outputs, *gradients(outputs, everything)]
    options = {"mask": mask.numpy(), "segment_ids": [x.int().numpy() for x in segment_ids], "window": (20, 3)}
    expected = by_jax(everything, ["bias", "sinks"], **options)
    for name, x, y in zip((*NAMES, "dbias", "dsinks"), ours, expected, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


def test_two_masks_are_added():
    q, k, v = qkv(15, grad=False)
    first, second = torch.randn(21, 21), torch.randn(4, 1, 21)
    out, _ = attention(q, k, v, Options(), attn_mask=first, bias=second)
    expected, _ = attention(q, k, v, Options(), bias=first + second)
    assert torch.equal(out, expected)


def test_argument_order_is_flash_attn_2s():
    q, k, v = qkv(9, grad=False)
    named = flash_attn_func(
        q, k, v, softmax_scale=0.4, causal=True, window_size=(5, 0), softcap=2.0, alibi_slopes=SLOPES,
        deterministic=True, return_attn_probs=True,
    )  # fmt: skip
    positional = flash_attn_func(q, k, v, 0.0, 0.4, True, (5, 0), 2.0, SLOPES, True, True)
    kv = torch.stack([k, v], dim=2)
    packed = flash_attn_kvpacked_func(q, kv, 0.0, 0.4, True, (5, 0), 2.0, SLOPES, True, True)
    for result in (positional, packed):
        assert torch.equal(result[0], named[0])
        assert torch.equal(result[1], named[1])
        assert result[2] is None
    qkv_ = torch.stack([q, q, q], dim=2)
    all_packed = flash_attn_qkvpacked_func(qkv_, 0.0, 0.4, True, (5, 0), 2.0, SLOPES, True, True)
    same = flash_attn_func(q, q, q, 0.0, 0.4, True, (5, 0), 2.0, SLOPES, True, True)
    assert torch.equal(all_packed[0], same[0])
    assert torch.equal(all_packed[1], same[1])


def test_results_come_alone_or_in_threes():
    q, k, v = qkv(10, grad=False)
    out = flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor)
    again, lse, probs = flash_attn_func(q, k, v, return_attn_probs=True)
    assert torch.equal(again, out)
    assert (lse.shape, lse.dtype, probs) == ((2, 4, 21), torch.float32, None)
    assert isinstance(flash_attn_kvpacked_func(q, torch.stack([k, v], 2)), torch.Tensor)
    assert isinstance(flash_attn_qkvpacked_func(torch.stack([q, q, q], 2)), torch.Tensor)


def test_packed_gradients_are_packed():
    q, k, v = qkv(11, Hk=4)
    expected = gradients(flash_attn_func(q, k, v, causal=True), (q, k, v))
    kv = torch.stack([k, v], 2).detach().requires_grad_()
    dq, dkv = gradients(flash_attn_kvpacked_func(q, kv, causal=True), (q, kv))
    assert torch.equal(dq, expected[0])
    assert torch.equal(dkv, torch.stack(expected[1:], 2))
    packed = torch.stack([q, k, v], 2).detach().requires_grad_()
    (d_packed,) = gradients(flash_attn_qkvpacked_func(packed, causal=True), (packed,))
    assert torch.equal(d_packed, torch.stack(expected, 2))


@pytest.mark.parametrize("empty", ["B", "Sq", "Sk"])
def test_nothing_to_see(empty):
    shape = {"B": 2, "Sq": 5, "Sk": 7} | {empty: 0}
    q = torch.randn(shape["B"], shape["Sq"], 4, 8, requires_grad=True)
    k, v = (torch.randn(shape["B"], shape["Sk"], 2, 8, requires_grad=True) for _ in range(2))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert torch.equal(out, torch.zeros(q.shape))
    assert torch.equal(lse, torch.full((shape["B"], 4, shape["Sq"]), -torch.inf))
    for x, grad in zip((q, k, v), gradients([out, lse], (q, k, v)), strict=True):
        assert torch.equal(grad, torch.zeros(x.shape))


def test_deterministic_reaches_the_kernels():
    q, k, v = qkv(12, grad=False)
    with Recorded() as recorded:
        flash_attn_func(q, k, v)
        flash_attn_func(q, k, v, deterministic=True)
        torch.use_deterministic_algorithms(True)
        try:
            flash_attn_func(q, k, v)
        finally:
            torch.use_deterministic_algorithms(False)
    assert [args[-1] for args in recorded.calls] == [False, True, True]

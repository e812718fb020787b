"""torch.nn.functional.scaled_dot_product_attention with "JFLASH" as its flash backend, against torch's own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from interop import sdpa_backend
from tests.interop.cases import gradients

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no registry of flash backends", allow_module_level=True)

sdpa_backend.register()


@pytest.fixture
def active():
    torch.nn.attention.activate_flash_attention_impl("JFLASH")
    yield
    torch.nn.attention.restore_flash_attention_impl()


def tensors(L=20, S=20, Hk=4):
    g = torch.Generator().manual_seed(0)
    shapes = (2, 4, L, 12), (2, Hk, S, 12), (2, Hk, S, 12)
    return [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]


def both(inputs, **options):
    out = scaled_dot_product_attention(*inputs, **options)
    return [out, *gradients(out, inputs)]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often each way came to our kernels."""
    found = {"attention_forward": 0, "attention_backward": 0}

    def counted(name, function):
        def call(*args):
            found[name] += 1
            return function(*args)

        return call

    for name in found:
        monkeypatch.setattr(sdpa_backend, name, counted(name, getattr(sdpa_backend, name)))
    return found


CASES = {
    "causal": ({}, {"is_causal": True}),
    "causal_more_keys": ({"S": 33}, {"is_causal": True}),
    "causal_fewer_keys": ({"L": 33}, {"is_causal": True, "scale": 0.2}),
    "grouped": ({"Hk": 2}, {"enable_gqa": True}),
    "bool_mask": ({"S": 33}, {"attn_mask": torch.rand(20, 33, generator=torch.Generator().manual_seed(1)) < 0.8}),
    "float_mask": ({"S": 33}, {"attn_mask": torch.randn(2, 1, 20, 33, generator=torch.Generator().manual_seed(1))}),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, calls):
    shape, options = CASES[name]
    inputs = tensors(**shape)
    expected = both(inputs, **options)
    torch.nn.attention.activate_flash_attention_impl("JFLASH")
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "JFLASH"
        found = both(inputs, **options)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert set(calls.values()) == {1}
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
        assert x.stride() == y.stride()


def test_compiled(active):
    inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors()]
    found = torch.compile(both, fullgraph=False)(inputs, is_causal=True)
    for x, y in zip(found, both(inputs, is_causal=True), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_dropout_stays_with_torch(active, calls):
    """On CPU torch's flash backend has none, so torch takes another."""
    scaled_dot_product_attention(*tensors(), dropout_p=0.5)
    assert set(calls.values()) == {0}


def test_is_only_there_while_active(calls):
    assert "JFLASH" in torch.nn.attention.list_flash_attention_impls()
    for active in (False, True, False):
        if active:
            torch.nn.attention.activate_flash_attention_impl("JFLASH")
        before = calls["attention_forward"]
        scaled_dot_product_attention(*tensors())
        assert calls["attention_forward"] == before + active
        if active:
            torch.nn.attention.restore_flash_attention_impl()


def test_older_torch_is_refused(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"torch==\S+ must be >= 2.11 for a registry of flash backends"):
        sdpa_backend.register()

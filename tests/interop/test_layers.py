"""interop.layers against torch's own functions: values, gradients, dtypes."""

import functools

import pytest
import torch
from torch.nn import functional as F

from interop import layers
from tests.interop.cases import gradients


def normal(seed, *shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


X, R, W, B = ((5, 24), (5, 24), (24,), (24,))
CASES = {
    "rms_norm": (layers.rms_norm_fn, lambda x, w: F.rms_norm(x, (24,), w, 1e-6), (X, W)),
    "rms_norm_residual": (
        functools.partial(layers.rms_norm_fn, prenorm=True),
        lambda x, w, b, r: (F.rms_norm(x + r, (24,), w, 1e-6) + b, x + r),
        (X, W, B, R),
    ),
    "layer_norm": (layers.layer_norm_fn, lambda x, w, b: F.layer_norm(x, (24,), w, b, 1e-6), (X, W, B)),
    "layer_norm_residual": (
        layers.layer_norm_fn,
        lambda x, w, b, r: F.layer_norm(x + r, (24,), w, b, 1e-6),
        (X, W, B, R),
    ),
    "dense": (layers.fused_dense_func, F.linear, (X, (12, 24), (12,))),
    "mlp": (
        layers.fused_mlp_func,
        lambda x, w1, w2, b1, b2: F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2),
        (X, (32, 24), (8, 32), (32,), (8,)),
    ),
    "mlp_without_biases": (
        lambda x, w1, w2: layers.fused_mlp_func(x, w1, w2, activation="sqrelu"),
        lambda x, w1, w2: F.relu(x @ w1.T) ** 2 @ w2.T,
        (X, (32, 24), (8, 32)),
    ),
}


WIDE_AND_NARROW = [
    ("layer_norm_residual", torch.float64),
    ("rms_norm_residual", torch.bfloat16),
    ("mlp", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in CASES), *WIDE_AND_NARROW])
def test_matches_torch(name, dtype):
    ours, theirs, shapes = CASES[name]
    tensors = [normal(n, *shape, dtype=dtype) for n, shape in enumerate(shapes)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    outs, expected = ours(*tensors), theirs(*wide)
    outs, expected = (x if isinstance(x, tuple) else (x,) for x in (outs, expected))
    rounding = torch.finfo(dtype).eps
    found, expected = (*outs, *gradients(outs, tensors)), (*expected, *gradients(expected, wide))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=4 * rounding, atol=64 * rounding * float(y.detach().abs().max()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction):
    logits, labels = normal(0, 6, 37), torch.tensor([3, 0, -100, 36, 7, 11])
    ours = layers.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)(logits, labels)
    theirs = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, [logits]), gradients(theirs, [logits]))


def test_z_loss():
    logits, labels = normal(1, 6, 37), torch.tensor([3, 0, -100, 36, 7, 11])
    loss, z = layers.cross_entropy_loss(logits, labels, lse_square_scale=0.01, logit_scale=0.5)
    s = 0.5 * logits
    expected = 0.01 * s.logsumexp(-1) ** 2 * (labels != -100)
    torch.testing.assert_close(z, expected.detach())
    assert not z.requires_grad
    plain = F.cross_entropy(s, labels, reduction="none") + expected
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradients(loss, [logits]), gradients(plain, [logits]))


def test_module_and_compile():
    norm = layers.RMSNorm(24)
    x = normal(2, 5, 24)
    out, h = torch.compile(lambda x: norm(2 * x, x, prenorm=True), backend="eager")(x)
    torch.testing.assert_close(h, 3 * x)
    torch.testing.assert_close(out, F.rms_norm(3 * x, (24,), norm.weight, 1e-5))
    (gradient,) = torch.autograd.grad(out.sum(), norm.weight)
    torch.testing.assert_close(gradient, F.rms_norm(3 * x, (24,), None, 1e-5).sum(0))


def test_errors():
    with pytest.raises(ValueError, match=r"weight.shape=\(3,\) must be \[24\]"):
        layers.rms_norm_fn(normal(3, 5, 24), normal(4, 3))
    with pytest.raises(TypeError, match=r"labels.dtype=torch.float32 must be torch.int32 or"):
        layers.cross_entropy_loss(normal(5, 5, 24), torch.zeros(5))
    with pytest.raises(ValueError, match="reduction='max' must be"):
        layers.CrossEntropyLoss(reduction="max")

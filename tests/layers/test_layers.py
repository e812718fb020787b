"""Norms, dense layers and cross-entropy: values and gradients against torch's own in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import layers
from tests.parity.cases import normal

torch = pytest.importorskip("torch")

F = torch.nn.functional
ACTIVATIONS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_approx": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sqrelu": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
}


def check(ours, theirs, arrays, dtype=jnp.float32):
    """Outputs and gradients for random cotangents; errors at most twice those of rounding to the dtype."""
    arrays = [x.astype(dtype) for x in arrays]
    outs, pull = jax.vjp(lambda *a: jax.tree.leaves(ours(*a)), *arrays)
    cotangents = [normal(90 + n, *x.shape).astype(x.dtype) for n, x in enumerate(outs)]
    tensors = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in arrays]
    expected = theirs(*tensors)
    expected = expected if isinstance(expected, tuple) else (expected,)
    weights = [torch.tensor(np.asarray(x, np.float64)) for x in cotangents]
    gradients = torch.autograd.grad(expected, tensors, weights)
    rtol = 4 * float(jnp.finfo(dtype).eps)
    for x, y in zip((*outs, *pull(cotangents)), (*expected, *gradients), strict=True):
        y = y.detach().numpy()
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=rtol, atol=8 * rtol * np.abs(y).max())


DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


@DTYPES
def test_rms_norm(dtype):
    x, r, w = normal(0, 3, 5, 24), normal(1, 3, 5, 24), normal(2, 24)
    check(lambda x, w: layers.rms_norm(x, w, eps=1e-3), lambda x, w: F.rms_norm(x, (24,), w, 1e-3), [x, w], dtype)
    if dtype == jnp.float32:
        check(
            lambda x, r, w: layers.rms_norm(x, w, residual=r),
            lambda x, r, w: (F.rms_norm(x + r, (24,), w, 1e-6), x + r),
            [x, r, w],
        )


@DTYPES
def test_layer_norm(dtype):
    x, w, b = normal(3, 4, 24), normal(4, 24), normal(5, 24)
    check(layers.layer_norm, lambda x, w, b: F.layer_norm(x, (24,), w, b), [x, w, b], dtype)
    check(layers.layer_norm, lambda x: F.layer_norm(x, (24,)), [x], dtype)


def test_residual_keeps_its_dtype():
    x, r = normal(6, 4, 24, dtype=jnp.bfloat16), normal(7, 4, 24)
    for norm in (layers.rms_norm, layers.layer_norm):
        out, h = norm(x, residual=r)
        assert (out.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_array_equal(h, x + r)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense(activation):
    x, w, b = normal(8, 3, 5, 16), normal(9, 16, 12), normal(10, 12)
    check(
        functools.partial(layers.dense, activation=activation),
        lambda x, w, b: ACTIVATIONS[activation](x @ w + b),
        [x, w, b],
    )


def test_mlp():
    arrays = normal(11, 3, 5, 8), normal(12, 8, 32), normal(13, 32, 8), normal(14, 32), normal(15, 8)
    check(
        layers.mlp,
        lambda x, w1, w2, b1, b2: F.gelu(x @ w1 + b1, approximate="tanh") @ w2 + b2,
        arrays,
    )


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "scale": {"logit_scale": 0.3},
    "z": {"lse_square_scale": 0.01, "label_smoothing": 0.2, "logit_scale": 1.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy(name):
    options = OPTIONS[name]
    labels = np.array([[3, 0, -100], [36, 7, 11]])
    smoothing, scale, z = (
        options.get(n, d) for n, d in (("label_smoothing", 0.0), ("logit_scale", 1.0), ("lse_square_scale", 0.0))
    )

    def theirs(x):
        s, target = (x * scale).flatten(0, 1), torch.tensor(labels).flatten()
        loss = F.cross_entropy(s, target, label_smoothing=smoothing, reduction="none")
        squared = z * s.logsumexp(-1) ** 2 * (target != -100)
        return (loss + squared).view(2, 3), squared.view(2, 3) + 0 * x.sum()

    check(lambda x: layers.cross_entropy(x, labels, **options), theirs, [normal(16, 2, 3, 37)])


def test_cross_entropy_of_what_is_masked_out_of_range_or_ignored():
    """A logit of -inf has no weight, an ignored row no gradient whatever it holds, a label out of range no loss."""
    logits = normal(18, 2, 5).at[0, 3].set(-jnp.inf)

    def theirs(x):
        return F.cross_entropy(x, torch.tensor([1, 4]), reduction="none")

    check(lambda x: layers.cross_entropy(x, np.array([1, 4]))[0], theirs, [logits])
    for ignored in (-100, 4):
        options = {"ignore_index": ignored, "lse_square_scale": 0.1}
        labels = np.array([1, ignored])
        loss, pull = jax.vjp(lambda x: layers.cross_entropy(x, labels, **options)[0], logits.at[1].set(jnp.nan))  # noqa: B023
        (d,) = pull(jnp.ones(2))
        assert jnp.isfinite(loss[0])
        assert loss[1] == 0
        assert jnp.isfinite(d[0]).all()
        assert (d[1] == 0).all()
    loss, _ = layers.cross_entropy(normal(19, 4, 5), np.array([-1, 5, -100, 2]))
    assert jnp.isnan(loss).tolist() == [True, True, False, False]
    wide, _ = layers.cross_entropy(jnp.zeros((1, 300)), np.array([255], np.uint8))  # 300 is no uint8
    np.testing.assert_allclose(wide, np.log(300), rtol=1e-6)


def test_cross_entropy_keeps_nothing_as_large_as_the_logits():
    logits, labels = normal(17, 64, 512, dtype=jnp.bfloat16), jnp.zeros(64, jnp.int32)
    _, pull = jax.vjp(lambda x: layers.cross_entropy(x, labels)[0], logits)
    kept = [x for x in jax.tree.leaves(pull) if x.size >= logits.size]
    assert all(x.dtype == logits.dtype for x in kept)
    assert len(kept) == 1


ERRORS = {
    "weight": (
        lambda: layers.rms_norm(jnp.ones((2, 3)), jnp.ones(2)),
        ValueError,
        r"weight.shape=\(2,\) must be \[3\]",
    ),
    "residual": (lambda: layers.layer_norm(jnp.ones((2, 3)), residual=jnp.ones(3)), ValueError, "that of x"),
    "dtype": (lambda: layers.rms_norm(jnp.ones((2, 3), int)), TypeError, "must be of a floating type"),
    "dense": (lambda: layers.dense(jnp.ones((2, 3)), jnp.ones((2, 3))), ValueError, r"must be \[I, O\] with I=3"),
    "activation": (lambda: layers.mlp(*[jnp.ones((2, 2))] * 3, activation="tanh"), ValueError, "activation='tanh'"),
    "labels": (lambda: layers.cross_entropy(jnp.ones((2, 3)), jnp.ones(2)), TypeError, "labels.dtype=float32"),
    "rows": (lambda: layers.cross_entropy(jnp.ones((2, 3)), jnp.ones(3, int)), ValueError, r"must be \(2,\)"),
    "smoothing": (
        lambda: layers.cross_entropy(jnp.ones((2, 3)), jnp.ones(2, int), label_smoothing=1.0),
        ValueError,
        r"label_smoothing=1.0 must be in \[0, 1\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()

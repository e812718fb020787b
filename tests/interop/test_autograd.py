"""Every way that torch differentiates: the right answer, or an error with a reason."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from interop import flash_attn_func, ops, scaled_dot_product_attention
from interop.attention import attention
from interop.operands import Operands, Options
from tests.interop.cases import Recorded, by_definition, gradients, qkv


def attend(*tensors, **options):
    """out and lse."""
    return flash_attn_func(*tensors, **options, return_attn_probs=True)[:2]


def small(**shape):
    return qkv(0, torch.float64, B=1, Sq=5, Sk=6, H=2, Hk=1, D=4, **shape)


def examples(n=3, **shape):
    """q, k, v with one more axis in front."""
    return [x.unflatten(0, (n, -1)) for x in qkv(1, B=2 * n, Sq=8, D=4, grad=False, **shape)]


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (2, 1), "softcap": 2.0}], ids=str)
def test_gradcheck(options):
    """Of both outputs in float64, one at a time and many at once."""
    assert torch.autograd.gradcheck(lambda *t: attend(*t, **options), small(), check_batched_grad=True)


def test_gradcheck_of_a_bias():
    q, k, v = (x.transpose(1, 2) for x in small())
    bias = torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True)

    def f(*tensors):
        return scaled_dot_product_attention(*tensors, enable_gqa=True)

    assert torch.autograd.gradcheck(f, (q, k, v, bias))


def test_gradcheck_of_sinks():
    q, k, v = small()
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    f = lambda q, k, v, s: attention(q, k, v, Options(right=0), sinks=s)  # noqa: E731
    assert torch.autograd.gradcheck(f, (q, k, v, sinks), check_batched_grad=True)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone(wanted):
    tensors = qkv(2)
    expected = gradients(flash_attn_func(*tensors, causal=True), tensors)[wanted]
    alone = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
    (found,) = gradients(flash_attn_func(*alone, causal=True), [alone[wanted]])
    assert torch.equal(found, expected)


def test_gradient_of_lse_alone():
    tensors = qkv(3)
    (_, lse), (_, expected) = attend(*tensors), by_definition(*tensors)
    for x, y in zip(gradients(lse, tensors[:2]), gradients(expected, tensors[:2]), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_without_grad():
    q, k, v = qkv(4)
    expected = flash_attn_func(q, k, v)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = flash_attn_func(q, k, v)
        assert torch.equal(out, expected)
        assert not out.requires_grad


def test_func_grad_and_vjp():
    tensors = qkv(5)
    expected = gradients(attend(*tensors, causal=True), tensors)
    plain = [x.detach() for x in tensors]
    outputs, pull = torch.func.vjp(lambda *t: attend(*t, causal=True), *plain)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(outputs)]

    def loss(*t):
        return sum((x * w).sum() for x, w in zip(attend(*t, causal=True), weights, strict=True))

    for found in (pull(tuple(weights)), torch.func.grad(loss, argnums=(0, 1, 2))(*plain)):
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 1)], ids=str)
def test_vmap_is_a_loop(in_dims):
    """Values and gradients, with every tensor mapped and with some shared."""
    q, k, v = (x if d == 0 else x.movedim(0, 1) if d else x[0] for x, d in zip(examples(), in_dims, strict=True))

    def both(q, k, v):
        outputs, pull = torch.func.vjp(attend, q, k, v)
        return (*outputs, *pull(tuple(x.sin() for x in outputs)))

    mapped = torch.vmap(both, in_dims)(q, k, v)
    each = [
        both(*(x if d is None else x.select(d, i) for x, d in zip((q, k, v), in_dims, strict=True))) for i in range(3)
    ]
    for x, y in zip(mapped, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mapped", [True, False])
def test_vmap_of_a_bias_gradient(mapped):
    """Each example has its own gradient, also of a bias that all share and that broadcasts over the batch."""
    q, k, v = (x.transpose(-2, -3) for x in examples(Hk=4))
    bias = torch.randn(3, 1, 4, 1, 8) if mapped else torch.randn(1, 4, 1, 8)
    grad = torch.func.grad(lambda b, *t: scaled_dot_product_attention(*t, b).square().sum())
    found = torch.vmap(grad, (0 if mapped else None, 0, 0, 0))(bias, q, k, v)
    expected = [grad(bias[i] if mapped else bias, q[i], k[i], v[i]) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mapped", [True, False])
def test_vmap_of_sinks_and_segments(mapped):
    """Each example has its own gradient, also of sinks that all share; segments are always its own."""
    q, k, v = examples()
    sinks = torch.randn(3, 4) if mapped else torch.randn(4)
    ids = torch.randint(2, (3, 2, 8))

    def loss(sinks, q, k, v, ids):
        out, lse = attention(q, k, v, Options(right=0), segment_ids=(ids, ids), sinks=sinks)
        return out.square().sum() + lse.sin().sum()

    grad = torch.func.grad(loss, argnums=(0, 1))
    found = torch.vmap(grad, (0 if mapped else None, 0, 0, 0, 0))(sinks, q, k, v, ids)
    each = [grad(sinks[i] if mapped else sinks, q[i], k[i], v[i], ids[i]) for i in range(3)]
    for x, y in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(y), atol=1e-5, rtol=1e-5)


def test_vmap_of_slopes_and_masks():
    q, k, v = examples(Hk=4)
    slopes = torch.rand(3, 4)
    found = torch.vmap(lambda *t: flash_attn_func(*t[:3], alibi_slopes=t[3]))(q, k, v, slopes)
    expected = [flash_attn_func(q[i], k[i], v[i], alibi_slopes=slopes[i]) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    mask = torch.rand(2, 1, 8, 8) < 0.7
    found = torch.vmap(lambda *t: scaled_dot_product_attention(*t, mask))(q, k, v)
    expected = [scaled_dot_product_attention(q[i], k[i], v[i], mask) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_vmap_of_dropout_draws_as_told():
    q, k, v = (x[:1].expand_as(x) for x in examples())

    def drop(q, k, v):
        return flash_attn_func(q, k, v, 0.5)

    same = torch.vmap(drop, randomness="same")(q, k, v)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(drop, randomness="different")(q, k, v)
    assert not torch.equal(different[0], different[1])
    words = torch.randint(-(2**31), 2**31, (3, 1, 2), dtype=torch.int32)

    def with_key(q, k, v, words):
        return ops.attention_forward(*Operands(q, k, v, dropout_seed=words), *Options(dropout_p=0.5))[0]

    together = torch.vmap(with_key)(q, k, v, words)
    for i in range(3):  # each example is what its own key gives alone
        torch.testing.assert_close(together[i], with_key(q[i], k[i], v[i], words[i]))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(drop)(q, k, v)


def test_jacrev():
    q, k, v = (x[0] for x in examples())
    jacobian = torch.func.jacrev(lambda q: flash_attn_func(q, k, v).sum((2, 3)))(q)
    expected = torch.autograd.functional.jacobian(lambda q: by_definition(q, k, v)[0].sum((2, 3)), q)
    torch.testing.assert_close(jacobian, expected, atol=1e-5, rtol=1e-5)


def test_forward_mode_raises():
    q, k, v = qkv(6, grad=False)
    reason = "no forward-mode derivative: the kernels differentiate backward only"
    with pytest.raises(NotImplementedError, match=reason):
        torch.func.jvp(lambda q: flash_attn_func(q, k, v), (q,), (q,))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match=reason):
            flash_attn_func(q, forward_ad.make_dual(k, k), v)


def test_second_derivative_raises():
    q, k, v = qkv(7)
    reason = "no second derivative: the kernels have a backward of first order only"
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=reason):
        dq.sum().backward()

    def slope(q):
        return torch.func.grad(lambda q: flash_attn_func(q, k.detach(), v.detach()).square().sum())(q).sum()

    with pytest.raises(NotImplementedError, match=reason):
        torch.func.grad(slope)(q.detach())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_dropout(reentrant):
    q, k, v = qkv(8)

    def block(q, k, v):
        return flash_attn_func(q.sin(), k, v, 0.4, causal=True).cos()

    torch.manual_seed(1)
    expected = gradients(block(q, k, v), (q, k, v))
    torch.manual_seed(1)
    with Recorded() as recorded:
        for x in (q, k, v):
            x.grad = None
        out = checkpoint(block, q, k, v, use_reentrant=reentrant)
        torch.manual_seed(2)  # the recomputation must not depend on where the generator is by then
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)))
    assert len(recorded.calls) == 2
    for x, y in zip((q, k, v), expected, strict=True):
        assert torch.equal(x.grad, y)


def test_autocast():
    """As torch's own attention: computed in autocast's dtype, whatever floating dtypes come in."""
    q, k, v = qkv(9)
    mixed = (q, k.detach().half(), v.detach().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_func(*mixed)
        wide = flash_attn_func(*(x.double() for x in (q, k, v)))
    assert torch.equal(out, flash_attn_func(*(x.bfloat16() for x in mixed)))
    assert torch.equal(wide, flash_attn_func(*(x.double() for x in (q, k, v)))), "float64 stays as it is"
    (dq,) = gradients(out, [q])
    assert dq.dtype == torch.float32
    assert torch.isfinite(dq).all()

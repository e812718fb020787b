"""The seed l1-attention: the program of its README on our module, its checks, and what its example shows."""

import pytest

torch = pytest.importorskip("torch")

import interop as l1attn  # noqa: E402


def test_readme_program():
    """Line for line, but that it does not insist on a GPU."""
    torch.manual_seed(0)
    m = l1attn.L1Attn()

    # batch_size 2, context 3, heads 4, channels 8
    q = torch.randn(2, 3, 4, 8)
    k = torch.randn(2, 3, 4, 8)
    if torch.cuda.is_available():
        q, k = q.cuda(), k.cuda()

    a = m.forward(q, k)

    assert a.shape == (2, 3, 3, 4)
    for b, s, t, h in ((0, 0, 0, 0), (1, 2, 0, 3), (0, 1, 2, 2)):
        expected = -(q[b, t, h] - k[b, s, h]).abs().sum() / 8**0.5
        torch.testing.assert_close(a[b, s, t, h], expected)


def test_softmax_over_the_keys_and_values_follow():
    """How the seed uses its scores: axis 1 is the keys'."""
    q, k, v = torch.randn(3, 2, 16, 8, 64)
    a = l1attn.L1Attn()(q, k).softmax(1)
    out = torch.einsum("bsth,bshw->bthw", a, v)
    torch.testing.assert_close(out, l1attn.l1_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_older_formula_and_layout():
    """1 / (0.001 + sum|q - k|) of its README, and the same over sqrt(D) of its code, [batch, head, key, query]."""
    q, k = torch.randn(2, 2, 5, 3, 8)
    distance = (q[:, :, None] - k[:, None]).abs().sum(-1)  # [b, t, s, h]
    for scale, factor in ((1.0, 1.0), (None, 8**-0.5)):
        found = l1attn.L1Attn(kind="reciprocal", scale=scale, layout="bhst")(q, k)
        torch.testing.assert_close(found, (1 / (0.001 + factor * distance)).permute(0, 3, 2, 1))


def test_its_gradient_check():
    """check.py: float64, (1, 16, 8, 64)."""
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 16, 8, 64, dtype=torch.float64).unbind(0)
    small = q[:, :3, :2, :8].clone().requires_grad_(), k[:, :3, :2, :8].clone().requires_grad_()
    assert torch.autograd.gradcheck(l1attn.L1Attn(), small, nondet_tol=1e-6)
    q, k = q.requires_grad_(), k.requires_grad_()
    plain = -(q[:, None] - k[:, :, None]).abs().sum(-1) / 8
    ours = l1attn.L1Attn()(q, k)
    torch.testing.assert_close(ours, plain)
    weights = torch.randn_like(plain)
    for x, y in zip(*(torch.autograd.grad(a, (q, k), weights) for a in (ours, plain)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.fixture
def sparse_inputs():
    """check_sparse.py: (2, 3, 16, 7), all pairs."""
    torch.manual_seed(2)
    T = 3
    co = torch.cartesian_prod(torch.arange(T), torch.arange(T))
    return [torch.randn(2, T, 16, 7, dtype=torch.float64, requires_grad=True) for _ in range(4)], co


def sparse_formula(q, k, v, co, use_softmax):
    """The denominator starts at 1."""
    mask = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    mask[co[:, 0], co[:, 1]] = True
    scores = -(q[:, :, None] - k[:, None]).abs().sum(-1) / q.shape[-1] ** 0.5
    weights = scores.exp() * mask[None, :, :, None]
    weights = weights / (1 + weights.sum(2, keepdim=True)) if use_softmax else weights
    return weights, torch.einsum("btsh,bshw->bthw", weights, v)


@pytest.mark.parametrize("use_softmax", [True, False])
@pytest.mark.parametrize("pairs", ["all", "permuted", "four fewer"])
def test_sparse_checks(sparse_inputs, use_softmax, pairs):
    (q, k, v, vb), co = sparse_inputs
    co = {"all": co, "permuted": co[torch.randperm(9)], "four fewer": co[[0, 2, 4, 7, 8]]}[pairs]
    coo, dst_mxlen, src_mxlen = l1attn.expandCoo(co)
    assert coo.shape == (len(co), 4)
    assert max(dst_mxlen, src_mxlen) <= 3
    weights, expected = sparse_formula(q, k, v, co, use_softmax)
    out = l1attn.L1AttnSparse()(v, q, k, coo, dst_mxlen, use_softmax)
    both = l1attn.L1AttnSparseBidi()(v, vb, q, k, coo, dst_mxlen, use_softmax)
    back = torch.einsum("btsh,bthw->bshw", weights, vb)
    for x, y in ((out, expected), (both, expected + back)):
        torch.testing.assert_close(x, y)
        cotangent = torch.randn_like(y)
        inputs = (q, k, v)
        for a, b in zip(*(torch.autograd.grad(z, inputs, cotangent, retain_graph=True) for z in (x, y)), strict=True):
            torch.testing.assert_close(a, b)


def test_expand_coo_ranks():
    coo, dst_mxlen, src_mxlen = l1attn.expandCoo(torch.tensor([[2, 0], [0, 1], [2, 1], [2, 3], [0, 0]]))
    assert coo.tolist() == [[2, 0, 0, 0], [0, 1, 0, 0], [2, 1, 1, 1], [2, 3, 2, 0], [0, 0, 1, 1]]
    assert (dst_mxlen, src_mxlen) == (3, 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matching_is_learned_sooner(seed):
    """Its example, small: by step 1800 L1 solves the task, and dot-product attention has hardly begun."""
    pytest.importorskip("optax")
    from examples.l1_matching import ATTENTION, train

    reciprocal, sink, _, dot_product = ATTENTION
    loss = {name: train(name, seed, steps=1800)[-1] for name in (reciprocal, sink, dot_product)}
    assert loss[reciprocal] < 0.1
    assert loss[sink] < 0.25 * loss[dot_product]
    assert loss[dot_product] > 0.1

"""L1 attention on torch tensors: JAX's numbers, formulas of torch in float64, and what torch does to functions."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import interop  # noqa: E402
import jflash  # noqa: E402

B, S, T, H, D, DV = 2, 9, 13, 4, 7, 5


def qkv(seed=0, dtype=torch.float32, Hk=2, Sk=T):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, S, H, D), (B, Sk, Hk, D), (B, Sk, Hk, DV)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(outputs, inputs):
    """Of a random weighting of the outputs."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in outputs]
    return outputs, torch.autograd.grad(outputs, inputs, weights), weights


def assert_jax(theirs, ours, tensors: dict):
    """ours(**tensors) and gradients are those of the JAX function theirs(**arrays), to a few roundings."""
    outputs, grads, weights = gradients(ours(**tensors), list(tensors.values()))
    arrays = {name: np.asarray(x.detach()) for name, x in tensors.items()}
    results, pull = jax.vjp(lambda arrays: theirs(**arrays), arrays)
    expected = pull(jax.tree.unflatten(jax.tree.structure(results), [np.asarray(w) for w in weights]))[0]
    results = *jax.tree.leaves(results), *(expected[name] for name in tensors)
    for x, y in zip((*outputs, *grads), results, strict=True):
        np.testing.assert_allclose(x.detach(), y, atol=1e-5)


OPTIONS = {
    "plain": {},
    "options": dict(scale=0.3, center=True, compute="f32", exclude_diagonal=True, window=(4, None), return_lse=True),
    "reciprocal": dict(kind="reciprocal", eps=0.05, causal=True, sink=0.5),
    "tanh1": dict(weight="tanh1"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_is_jax_s(name):
    options = OPTIONS[name]
    tensors = dict(zip("qkv", qkv(), strict=True))
    assert_jax(
        lambda **a: jflash.l1_attention(**a, **options), lambda **a: interop.l1_attention(**a, **options), tensors
    )


def test_arrays_beside_q_k_v():
    mask = np.random.default_rng(0).uniform(size=(B, 1, S, T)) < 0.7
    ids = np.arange(S)[None].repeat(B, 0) // 5, np.arange(T)[None].repeat(B, 0) // 7
    tensors = dict(zip("qkv", qkv(1), strict=True))
    tensors |= {"bias": torch.randn(1, H, S, T).requires_grad_(), "sink": torch.randn(H).requires_grad_()}
    assert_jax(
        lambda **a: jflash.l1_attention(**a, mask=mask, segment_ids=ids),
        lambda **a: interop.l1_attention(**a, mask=torch.tensor(mask), segment_ids=tuple(map(torch.tensor, ids))),
        tensors,
    )


@pytest.mark.parametrize(
    "options",
    [dict(causal=True), dict(window=(3, 2), sink=0.5, kind="reciprocal", eps=0.1), dict(weight="exp")],
    ids=str,
)
def test_both_ways_is_jax_s(options):
    q, k, v = qkv(2, Sk=S)
    tensors = {"q": q, "k": k, "vf": v, "vb": torch.randn(v.shape).requires_grad_()}
    tensors |= {"bias": torch.randn(H, S, S)[None].requires_grad_()}
    assert_jax(
        lambda **a: jflash.l1_attention_bidi(**a, **options),
        lambda **a: interop.l1_attention_bidi(**a, **options),
        tensors,
    )


def test_pairs_are_jax_s():
    q, k, v = qkv(3, Sk=S)
    pairs = np.argwhere(np.tri(S))
    tensors = {"q": q, "k": k, "v": v, "vb": torch.randn(v.shape).requires_grad_()}
    tensors |= {"sink": torch.randn(B, H).requires_grad_()}
    assert_jax(
        lambda **a: jflash.l1_attention_sparse(**a, pairs=pairs),
        lambda **a: interop.l1_attention_sparse(**a, pairs=torch.tensor(pairs)),
        tensors,
    )


def test_packed_is_one_after_another():
    q, k, v = (x[:1] for x in qkv(4, Sk=S))
    cu = torch.tensor([0, 4, 4, 7])
    out = interop.l1_attention(q, k, v, cu_seqlens=cu, causal=True)
    for a, b in ((0, 4), (4, 7)):
        alone = interop.l1_attention(*(x[:, a:b] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(out[:, a:b], alone)
    assert not out[:, 7:].any()
    pair = interop.l1_attention(q, k, v, cu_seqlens=(cu, torch.tensor([0, 1, 5, 9])))
    torch.testing.assert_close(pair[:, :4], interop.l1_attention(q[:, :4], k[:, :1], v[:, :1]))


@pytest.mark.parametrize("kind", ["neg", "reciprocal"])
def test_gradcheck(kind):
    """In float64, away from ties, against finite differences."""
    q, k, v = qkv(5, torch.float64)
    functions = (
        lambda q, k, v: interop.l1_attention(q, k, v, kind=kind, eps=0.2, sink=0.1, return_lse=True),
        lambda q, k, v: interop.l1_scores(q, k, kind=kind, eps=0.2, layout="bsth"),
    )
    for f in functions:
        assert torch.autograd.gradcheck(f, (q[:1, :3, :2], k[:1, :4, :1], v[:1, :4, :1]))


def test_scores_are_cdist():
    q, k, _ = qkv(6, torch.float64, Hk=H)
    expected = -torch.cdist(q.transpose(1, 2), k.transpose(1, 2), p=1) * D**-0.5
    for layout in ("bhts", "bsth", "bhst"):
        found = interop.l1_scores(q, k, layout=layout)
        torch.testing.assert_close(found, torch.einsum(f"bhts->{layout}", expected))
    half = interop.l1_scores(q.bfloat16(), k.bfloat16())
    assert half.dtype == torch.float32


def test_ties_have_no_gradient():
    """torch.abs and cdist say so too."""
    x = torch.randn(1, 5, 2, 6).round().requires_grad_()
    y = torch.randn(1, 5, 2, 6).round().requires_grad_()
    plain = -(x[:, :, None] - y[:, None]).abs().sum(-1) * 6**-0.5
    ours = interop.l1_scores(x, y, layout="bsth").transpose(1, 2)
    weights = torch.randn(plain.shape)
    for a, b in zip(*(torch.autograd.grad(s, (x, y), weights) for s in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)


def f(q, k, v):
    return interop.l1_attention_bidi(q, k, v, v.cos(), causal=True) + interop.l1_attention_sparse(
        q, k, v, torch.ones(S, S).tril().nonzero()
    )


def test_compiles_into_one_graph():
    inputs = qkv(7, Sk=S)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for x, y in zip(*(gradients(g(*inputs), inputs)[1] for g in (compiled, f)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("operator", ["l1_forward", "l1_backward"])
def test_operators_keep_torch_s_rules(operator):
    q, k, v = (x.detach() for x in qkv(8))
    options = ("attention", None, "neg", 1e-3, "softmax", False, -1, 0, False, "auto", "bhts")
    args = (q, k, v, None, torch.randn(1, H, S, T), torch.randn(H), *[None] * 6, *options)
    if operator == "l1_backward":
        out, lse = torch.ops.jflash.l1_forward(*args)
        args = (torch.randn_like(out), None, out, lse, *args, True)
    torch.library.opcheck(
        getattr(torch.ops.jflash, operator).default, args, test_utils=("test_schema", "test_faketensor")
    )


def test_func_transforms():
    inputs = [x.detach() for x in qkv(9, Sk=S)]
    one = lambda q, k, v: interop.l1_attention(q[None], k[None], v[None])[0]  # noqa: E731
    torch.testing.assert_close(torch.vmap(one)(*inputs), interop.l1_attention(*inputs))
    each = torch.vmap(torch.func.grad(lambda *a: one(*a).sin().sum()))(*inputs)
    torch.testing.assert_close(each, torch.func.grad(lambda *a: interop.l1_attention(*a).sin().sum())(*inputs))


def test_autocast_and_checkpoint():
    q, k, v = qkv(10)
    with torch.autocast("cpu", torch.bfloat16):
        assert interop.l1_attention(q, k, v).dtype == torch.bfloat16
    kept = torch.utils.checkpoint.checkpoint(interop.l1_attention, q, k, v, use_reentrant=False)
    for x, y in zip(*(gradients(out, (q, k, v))[1] for out in (kept, interop.l1_attention(q, k, v))), strict=True):
        torch.testing.assert_close(x, y)


def test_fake_pairs_are_not_read():
    with FakeTensorMode():
        q, pairs = torch.empty(B, S, H, 8), torch.empty(4, 2, dtype=torch.int32)
        assert interop.L1AttnSparse()(q, q, q, pairs, 4).shape == q.shape


def test_nothing():
    q, k, v = qkv(11)
    out, lse = interop.l1_attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert not out.any()
    assert lse.isneginf().all()
    assert interop.l1_attention(q[:0], k[:0], v[:0]).shape == (0, S, H, DV)
    assert interop.l1_scores(q, k[:, :0]).shape == (B, H, S, 0)
    none = interop.l1_attention_sparse(q, k, v, torch.zeros(0, 2, dtype=torch.int32))
    assert not torch.autograd.grad(none.sum(), q)[0].any()


def test_second_derivative_raises():
    q, k, v = qkv(12)
    (dq,) = torch.autograd.grad(interop.l1_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first order only"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: interop.l1_attention(q, k, v, kind="l3"), r"kind='l3' must be one of 'neg', 'reciprocal'"),
        (lambda q, k, v: interop.l1_attention(q, k, v, kind="reciprocal", eps=0.0), r"eps=0.0 must be > 0"),
        (lambda q, k, v: interop.l1_attention(q, k, v, weight="exp", sink=1.0), r"sink=1.0 needs weight='softmax'"),
        (lambda q, k, v: interop.l1_attention(q, k, v, weight="exp", return_lse=True), r"return_lse needs weight"),
        (lambda q, k, v: interop.l1_attention(q, k[..., :6], v), r"head dims of q and k, 7 and 6, must be equal"),
        (lambda q, k, v: interop.l1_attention(q, k, v, cu_seqlens=torch.tensor([0, 3])), r"cu_seqlens needs batch=1"),
        (lambda q, k, v: interop.l1_attention_bidi(q, k, v, v), r"query length=9 must equal key length=13"),
        (lambda q, k, v: interop.l1_scores(q, k, layout="bths"), r"layout='bths' must be one of"),
        (
            lambda q, k, v: interop.l1_attention_sparse(q, k, v, torch.tensor([[0, 13]])),
            r"pairs\[0\]=\[0, 13\] must be",
        ),
        (
            lambda q, k, v: interop.l1_attention_sparse(q, k, v, torch.tensor([[0, 1], [0, 1]])),
            r"\[0, 1\] must be there",
        ),
        (lambda q, k, v: interop.l1_attention_sparse(q, k, v, torch.tensor([0, 1])), r"must be integers \[E, 2\]"),
        (
            lambda q, k, v: interop.L1AttnSparse()(v, q, k, torch.tensor([[0, 1], [0, 2]]), 1, True),
            r"dst_mxlen=1 must be >= 2, the pairs of one query",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv(13))


def test_types():
    q, k, v = qkv(14)
    with pytest.raises(TypeError, match=r"mask.dtype=torch.float32 must be torch.bool"):
        interop.l1_attention(q, k, v, mask=torch.zeros(S, T))
    with pytest.raises(TypeError, match=r"k must be a torch.Tensor"):
        interop.l1_attention(q, k.detach().numpy(), v)

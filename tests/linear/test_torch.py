"""Linear attention of torch tensors: values and gradients against torch's own autograd of the written-out formulas."""

import copy

import pytest

torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import interop  # noqa: E402

B, S, H = 2, 37, 2
MASKS = [(B, H, S, S), (1, 1, S, S), (B, 1, 1, S), (1, H, S, 1), (1, 1, 1, 1)]


def leaf(*shape, dtype=torch.float32, seed=[0]):  # noqa: B006
    seed[0] += 1
    generator = torch.Generator().manual_seed(seed[0])
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def close(ours, theirs, tolerance=2e-5):
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype
        assert (x - y).abs().max() <= tolerance * max(1, y.abs().max()), (x - y).abs().max()


def with_gradients(function, *leaves):
    """The results, then the gradient of each leaf, with random cotangents."""
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    cotangents = [leaf(*x.shape, dtype=x.dtype, seed=[99]).detach() for x in results]
    return *results, *torch.autograd.grad(results, leaves, cotangents)


def recurrence(q, k, v, g, state, scale=None):
    """`chunk_simple_gla` one token at a time."""
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    outs = []
    for t in range(q.shape[1]):
        gate = (g if g.dim() == 1 else g[:, t]).exp()[..., None, None]
        state = gate * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append(torch.einsum("bhd,bhdv->bhv", q[:, t], state) * (scale or q.shape[-1] ** -0.5))
    return torch.stack(outs, 1), state


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masked_with_the_gradient_of_the_mask(mask):
    leaves = leaf(B, H, S, 8), leaf(B, H, S, 8), leaf(B, H, S, 5), leaf(*mask)
    ours = with_gradients(interop.flash_linear_attention, *leaves)
    close(ours, with_gradients(interop.normal_linear_attention, *leaves))


def test_one_key_head_and_other_lengths():
    leaves = leaf(B, 3, S, 8), leaf(B, 1, 20, 8), leaf(B, 3, 20, 5), leaf(1, 1, S, 20)
    close(*(with_gradients(f, *leaves) for f in (interop.flash_linear_attention, interop.normal_linear_attention)))


def test_without_a_mask_it_is_not_causal():
    leaves = leaf(B, H, S, 8), leaf(B, H, 20, 8), leaf(B, H, 20, 5)
    close(*(with_gradients(f, *leaves) for f in (interop.flash_linear_attention, interop.normal_linear_attention)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_masks_without_gradient(dtype):
    leaves = leaf(B, H, S, 8), leaf(B, H, S, 8), leaf(B, H, S, 5)
    mask = torch.ones(S, S).tril().to(dtype)[None, None]
    ours, theirs = (
        with_gradients(lambda *x, f=f: f(*x, mask), *leaves)
        for f in (interop.flash_linear_attention, interop.normal_linear_attention)
    )
    close(ours, theirs)


@pytest.mark.parametrize("each", ["token", "head"])
def test_simple_gla(each):
    gate = leaf(B, S, 4) if each == "token" else leaf(4)
    leaves = leaf(B, S, H, 8), leaf(B, S, H, 8), leaf(B, S, 4, 6), gate, leaf(B, 4, 8, 6)

    def ours(q, k, v, g, state):
        gates = {"g" if each == "token" else "g_gamma": -g.abs()}
        return interop.chunk_simple_gla(q, k, v, **gates, initial_state=state, output_final_state=True, chunk_size=16)

    def theirs(q, k, v, g, state):
        return recurrence(q, k, v, -g.abs(), state)

    close(with_gradients(ours, *leaves), with_gradients(theirs, *leaves))


def test_recurrent_name_packed_and_without_state():
    q, k, v, g = leaf(1, S, H, 8), leaf(1, S, H, 8), leaf(1, S, H, 6), -leaf(1, S, H).abs()
    cu = torch.tensor([0, 10, S])
    out, state = interop.fused_recurrent_simple_gla(q, k, v, g, scale=0.5, cu_seqlens=cu)
    assert state is None
    parts = [
        recurrence(*(x[:, a:b] for x in (q, k, v, g)), torch.zeros(1, H, 8, 6), 0.5)[0] for a, b in ((0, 10), (10, S))
    ]
    close((out,), (torch.cat(parts, dim=1),))
    backwards, _ = interop.fused_recurrent_simple_gla(q, k, v, g, reverse=True)
    flipped, _ = interop.chunk_simple_gla(*(x.flip(1) for x in (q, k, v, g)))
    close((backwards,), (flipped.flip(1),))


def test_states_with_values_first():
    q, k, v, state = leaf(B, S, H, 8), leaf(B, S, H, 8), leaf(B, S, H, 6), leaf(B, H, 8, 6)
    out, last = interop.chunk_simple_gla(q, k, v, initial_state=state, output_final_state=True)
    turned, last_turned = interop.chunk_simple_gla(
        q, k, v, initial_state=state.mT, output_final_state=True, state_v_first=True
    )
    close((turned, last_turned.mT), (out, last))


def test_normalized_states_go_on():
    q, k = leaf(B, S, H, 8).detach().abs(), leaf(B, S, H, 8).detach().abs()
    v = leaf(B, S, H, 6).detach()
    whole, (kv, z) = interop.linear_attention(q, k, v, normalize=True, return_state=True)
    first, state = interop.linear_attention(*(x[:, :20] for x in (q, k, v)), normalize=True, return_state=True)
    second, last = interop.linear_attention(
        *(x[:, 20:] for x in (q, k, v)), normalize=True, initial_state=state, return_state=True
    )
    close((torch.cat([first, second], 1), *last), (whole, kv, z))


def test_double_precision_by_finite_differences():
    leaves = [leaf(1, 6, 1, 3, dtype=torch.float64) for _ in range(3)] + [leaf(1, 6, 1, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v, g: interop.chunk_simple_gla(q, k, v, -g.abs())[0], leaves)


def test_compile_func_and_autocast():
    q, k, v, g = leaf(B, S, H, 8), leaf(B, S, H, 8), leaf(B, S, H, 8), -leaf(B, S, H).abs().detach()

    def loss(q):
        return interop.chunk_simple_gla(q, k, v, g)[0].sin().sum()

    (expected,) = torch.autograd.grad(loss(q), q)
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(q), q)
    close((compiled, torch.func.grad(loss)(q)), (expected, expected))
    each = torch.func.vmap(
        torch.func.grad(lambda q, k, v, g: interop.chunk_simple_gla(*(x[None] for x in (q, k, v, g)))[0].sin().sum())
    )
    close((each(q, k, v, g),), (expected,))
    with torch.autocast("cpu", torch.bfloat16):
        assert interop.chunk_simple_gla(q, k.half().float(), v)[0].dtype == torch.bfloat16


def test_fake_tensors_have_shapes():
    with FakeTensorMode():
        q = torch.empty(B, S, H, 8)
        assert interop.linear_attention(q, q, q, log_decay=torch.empty(H)).shape == (B, S, H, 8)


def test_empty():
    q, state = leaf(B, 0, H, 8), leaf(B, H, 8, 8)
    out, final = interop.chunk_simple_gla(q, q, q, initial_state=state, output_final_state=True)
    assert out.shape == q.shape
    close((final, *torch.autograd.grad(final.sum(), state)), (state, torch.ones_like(state)))


def test_errors():
    q = leaf(B, S, H, 8)
    with pytest.raises(ValueError, match=r"log_decay max=1 must be <= 0"):
        interop.chunk_simple_gla(q, q, q, g_gamma=torch.ones(H))
    with pytest.raises(ValueError, match="g with g_gamma must be one or the other"):
        interop.chunk_simple_gla(q, q, q, g=torch.zeros(B, S, H), g_gamma=torch.zeros(H))
    with pytest.raises(ValueError, match="causal=True with a mask"):
        interop.linear_attention(q, q, q, mask=torch.ones(1, 1, S, S), causal=True)
    with pytest.raises(ValueError, match="return_state needs causal=True and no mask"):
        interop.linear_attention(q, q, q, causal=False, return_state=True)
    with pytest.raises(ValueError, match=r"cu_seqlens=\[0, 40\] must start at 0, never fall, and end at 37 or before"):
        interop.linear_attention(q[:1], q[:1], q[:1], cu_seqlens=torch.tensor([0, 40]))
    with pytest.raises(ValueError, match=r"q.shape=\[37, 2, 8\] must have 4 axes"):
        interop.linear_attention(q[0], q, q)
    (first,) = torch.autograd.grad(interop.linear_attention(q, q, q).pow(2).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


def test_block_is_its_formula_and_goes_on_from_a_state():
    torch.manual_seed(0)
    layer = interop.NormLinearAttention(16, 2, layer_idx=1, num_layers=4)
    block = interop.TransNormerBlock(16, 2, layer_idx=1, num_layers=4)
    x = 10 * torch.randn(B, S, 16)  # so that the norm's eps is nothing
    q, k, v, u = layer.qkvu(x).chunk(4, -1)
    q, k, v = (torch.nn.functional.silu(y).unflatten(-1, (2, 8)) for y in (q, k, v))
    slopes = torch.tensor([2**-4, 2**-8]) * (1 - 1 / 3 + 1e-5)
    out, _ = recurrence(q, k, v, -slopes, torch.zeros(B, 2, 8, 8), scale=1.0)
    out = out.flatten(-2)
    out = layer.out(torch.sigmoid(u) * out / out.norm(dim=-1, keepdim=True) * 4)
    close((layer(x),), (out,), 1e-4)
    whole, _ = block(x, return_state=True)
    first, state = block(x[:, :20], return_state=True)
    close((torch.cat([first, block(x[:, 20:], state)], 1),), (whole,), 1e-4)
    copy.deepcopy(block)(x).sum().backward()
    block(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    with pytest.raises(ValueError, match="dim=16 must be a multiple of heads=3"):
        interop.TransNormerBlock(16, 3, layer_idx=0, num_layers=1)


def test_block_both_sides_and_in_bfloat16():
    layer = interop.NormLinearAttention(16, 2, layer_idx=0, num_layers=2, causal=False).bfloat16()
    x = torch.randn(B, S, 16, dtype=torch.bfloat16)
    out, mirrored = layer(x), layer(x.flip(1)).flip(1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, mirrored, rtol=0.05, atol=0.05)

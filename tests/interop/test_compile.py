"""torch.compile, torch.export and the tools that look at operators."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from interop import flash_attn_func, l1_attention, linear_attention, ops, scaled_dot_product_attention
from interop.operands import Operands, Options
from tests.interop.cases import dropout_key, gradients, qkv

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def closes(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


OPERANDS = {
    "plain": lambda q, k, v: Operands(q, k, v),
    "strided": lambda q, k, v: Operands(q.transpose(0, 1).contiguous().transpose(0, 1), k, v),
    "all": lambda q, k, v: Operands(
        q,
        k,
        v,
        bias=torch.randn(1, 4, 1, 21),
        sinks=torch.randn(1, 4),
        mask=torch.rand(2, 1, 21, 21) < 0.9,
        q_segment_ids=torch.randint(2, (2, 21), dtype=torch.int32),
        kv_segment_ids=torch.randint(2, (2, 21), dtype=torch.int32),
        alibi_slopes=SLOPES[None],
        dropout_seed=torch.tensor([[5, -7]], dtype=torch.int32),
    ),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_opcheck(name):
    options = Options()
    if name == "all":
        options = Options(scale=0.4, left=9, right=0, softcap=3.0, dropout_p=0.3)
    operands = OPERANDS[name](*qkv(0, grad=False))
    args = (*operands, *options)
    torch.library.opcheck(ops.attention_forward, args)
    out, lse = ops.attention_forward(*args)
    for d_lse in (None, torch.randn(lse.shape)):
        torch.library.opcheck(
            ops.attention_backward,
            (torch.randn(out.shape), d_lse, out, lse, *args, operands.bias is not None),
        )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_whole(backend):
    """Both outputs, every option, no graph break; float and int arguments that are graph inputs too."""

    def f(q, k, v, scale, left):
        out, lse, _ = flash_attn_func(q.sin(), k, v, 0.0, scale, True, (left, -1), 3.0, SLOPES, False, True)
        return out * 2, lse.cos()

    tensors = qkv(1)
    found = torch.compile(f, fullgraph=True, backend=backend)(*tensors, 0.3, 7)
    expected = f(*tensors, 0.3, 7)
    closes(found, expected)
    closes(gradients(found, tensors), gradients(expected, tensors))


def test_compile_dynamic():
    """New lengths do not recompile torch's graph, whatever the layout."""
    counter = CompileCounterWithBackend("aot_eager")

    def f(*tensors):
        return flash_attn_func(*(x.transpose(1, 2) for x in tensors), causal=True).cos()

    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for length in (8, 12, 20):
        tensors = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in qkv(2, Sq=length)]
        found, expected = compiled(*tensors), f(*tensors)
        compilations.append(counter.frame_count)
        closes([found], [expected])
        closes(gradients(found, tensors), gradients(expected, tensors))
    assert compilations[0] == compilations[-1]


def test_compile_sdpa_with_a_bias():
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in qkv(3, Hk=4))
    bias = torch.randn(4, 1, 21, requires_grad=True)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    found, expected = compiled(q, k, v, bias), scaled_dot_product_attention(q, k, v, bias)
    closes([found], [expected])
    inputs = (q, k, v, bias)
    closes(gradients(found, inputs), gradients(expected, inputs))


def test_compile_dropout_and_autocast():
    q, k, v = qkv(4, grad=False)

    def f(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return flash_attn_func(q, k, v, 0.4)

    dropout_key(5)
    expected = f(q, k, v)
    dropout_key(5)
    found = torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(found, expected)


FUNCTIONS = [flash_attn_func, linear_attention, l1_attention]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compile_one_tensor_as_all_three(function):
    (q, *_) = qkv(5, B=1, Sq=9)
    compiled = torch.compile(lambda x: function(x, x, x), fullgraph=True, backend="aot_eager")
    closes(gradients(compiled(q), [q]), gradients(function(q, q, q), [q]))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_torch_func_is_right(function):
    """Dynamo cannot trace the gradient there, so that runs outside of the graph: right, or an error."""
    q, k, v = qkv(6, B=1, Sq=5, grad=False)

    def slope(q):
        return torch.func.grad(lambda q: function(q, k, v).square().sum())(q)

    closes([torch.compile(slope, backend="aot_eager")(q)], [slope(q)])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"in a torch\.func transform is not traced"):
        torch.compile(slope, backend="aot_eager", fullgraph=True)(q)


def test_compiled_forward_mode_raises():
    q, k, v = qkv(6, B=1, Sq=5, grad=False)

    def tangent(q):
        return torch.func.jvp(lambda q: flash_attn_func(q, k, v), (q,), (q,))

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.compile(tangent, backend="aot_eager")(q)


def test_compiled_second_derivative_raises():
    q, k, v = qkv(7)
    out = torch.compile(flash_attn_func, backend="aot_eager")(q, k, v)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        dq.sum().backward()


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, causal=True) + 1

    tensors = qkv(8, grad=False)
    program = torch.export.export(Block(), tuple(tensors), strict=strict)
    assert "jflash.attention_forward" in str(program.graph)
    assert torch.equal(program.module()(*tensors), Block()(*tensors))


def test_meta_tensors_have_shapes():
    q, k, v = (x.to("meta") for x in qkv(9, Dv=24, Sk=30, grad=False))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.shape, lse.shape, out.device.type) == ((2, 21, 4, 24), (2, 4, 21), "meta")


def test_flops_are_counted_as_torch_counts_its_own():
    tensors = qkv(10, Sk=30, Hk=4, Dv=24)
    q, k, v = (x.transpose(1, 2) for x in tensors)
    counts = []
    for attend in (
        lambda: scaled_dot_product_attention(q, k, v),
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
    ):
        with FlopCounterMode(display=False) as forward:
            out = attend()
        with FlopCounterMode(display=False) as backward:
            gradients(out, tensors)
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    forward = 2 * 2 * 4 * 21 * 30 * (16 + 24)
    backward = 2 * 2 * 4 * 21 * 30 * (3 * 16 + 2 * 24)
    assert counts[0] == (forward, backward)
    assert counts[1][0] == forward


def test_profiler_names_the_operators():
    tensors = qkv(11)
    with profile() as seen:
        gradients(flash_attn_func(*tensors), tensors)
    names = {event.key for event in seen.key_averages()}
    assert {"jflash::attention_forward", "jflash::attention_backward"} <= names

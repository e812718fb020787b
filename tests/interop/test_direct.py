"""Calls launched without XLA, as far as a CPU shows it: the kernels are played by Python functions on addresses."""

import ctypes
import functools
import math

import jax
import jax.numpy as jnp
import pytest
import torch

from interop import attention, bridge, direct, flash_attn_func, kernels, programs
from interop.operands import Operands, Options
from tests.interop.cases import by_definition, cotangent, qkv
from tests.kernels.calls import on_hopper

CPU = torch.device("cpu")
LOG2E = math.log2(math.e)


def structs(*shapes, dtype=jnp.float16):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def lower(function, arguments, **static) -> programs.Program:
    with on_hopper():
        return programs.lower(functools.partial(function, **static), arguments)


def memory(address: int, shape, dtype) -> torch.Tensor:
    """The tensor at an address."""
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


@pytest.fixture
def played(monkeypatch):
    """played(*kernels): plays the kernels of a program, in their order, by functions of (inputs and outputs)."""

    def play(*players):
        queue = list(players)

        def compiled(module):
            assert isinstance(module, bytes) and len(module) > 1000
            number = len(players) - len(queue)
            player = queue.pop(0)

            def launch(kernel, stream, addresses):
                assert (kernel, stream) == (number, 7)
                player(*addresses)

            return number, launch

        monkeypatch.setattr(direct, "_compile", compiled)
        monkeypatch.setattr(direct, "_stream", lambda index: 7)

    return play


class Attention:
    """The kernels of attention, played on memory of the shapes that they would see."""

    def __init__(self, q, k, v, rows, block_kv, block_q, **options):
        self.tensors, self.options = (q, k, v), options
        (self.B, self.Sq, self.H, self.D), (_, self.Sk, self.Hk, _) = q.shape, k.shape
        self.rows, self.block_kv, self.block_q = rows, block_kv, block_q

    def array(self, address, shape, fit=0, dtype=torch.float16):
        """[B, S, ., .] in the memory of max(S, fit) rows; what lies behind must be zero."""
        whole = memory(address, (shape[0], max(shape[1], fit), *shape[2:]), dtype)
        assert not whole[:, shape[1] :].any()
        return whole[:, : shape[1]]

    def inputs(self, q, k, v, q_fit):
        shapes = [tuple(x.shape) for x in self.tensors]
        fits = (q_fit, self.block_kv, self.block_kv)
        return [self.array(*x).double() for x in zip((q, k, v), shapes, fits, strict=True)]

    def forward(self, q, k, v, *rest):
        out, lse = rest[-2:]  # after the table of a persistent kernel
        found, found_lse = by_definition(*self.inputs(q, k, v, self.rows), **self.options)
        memory(out, (self.B, max(self.Sq, self.rows), self.H, self.D), torch.float16)[:, : self.Sq] = found
        rows = -(-self.Sq // self.rows) * self.rows
        memory(lse, (self.B, self.H, rows), torch.float32)[:, :, : self.Sq] = found_lse

    @property
    def statistics(self):
        return self.B, self.H, -(-self.Sq // self.block_q) * self.block_q

    def delta(self, out, d_out, lse, d_lse, lse2, delta, dq):
        shape = (self.B, self.Sq, self.H, self.D)
        out, d_out = (self.array(x, shape, 64) for x in (out, d_out))
        lse, d_lse = (memory(x, self.statistics, torch.float32) for x in (lse, d_lse))
        assert (lse[:, :, self.Sq :] == -math.inf).all() and not d_lse[:, :, self.Sq :].any()
        memory(lse2, self.statistics, torch.float32)[:] = lse * LOG2E
        rows = torch.zeros(self.statistics)
        rows[:, :, : self.Sq] = (out.double() * d_out.double()).sum(-1).transpose(1, 2)
        memory(delta, self.statistics, torch.float32)[:] = rows - d_lse
        memory(dq, (*self.statistics, self.D), torch.float32)[:] = 0

    def backward(self, q, k, v, d_out, lse2, delta, dq, dk, dv, dq_again):
        assert dq == dq_again
        q, k, v = self.inputs(q, k, v, self.block_q)
        d_out = self.array(d_out, (self.B, self.Sq, self.H, self.D), self.block_q).double()
        lse2, delta = (memory(x, self.statistics, torch.float32)[:, :, : self.Sq] for x in (lse2, delta))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = by_definition(*leaves, **self.options)
        torch.testing.assert_close(lse.float() * LOG2E, lse2, atol=1e-2, rtol=1e-2)
        d_lse = (out * d_out).sum(-1).transpose(1, 2) - delta
        grads = torch.autograd.grad([out, lse], leaves, [d_out, d_lse])
        memory(dq, (*self.statistics, self.D), torch.float32)[:, :, : self.Sq] += grads[0].transpose(1, 2)
        for address, grad in zip((dk, dv), grads[1:], strict=True):
            shape = (self.B, max(self.Sk, self.block_kv), self.Hk, self.D)
            memory(address, shape, torch.float16)[:, : self.Sk] = grad

    def dq(self, scratch, dq):
        found = memory(scratch, (*self.statistics, self.D), torch.float32)[:, :, : self.Sq].transpose(1, 2)
        memory(dq, (self.B, max(self.Sq, self.block_q), self.H, self.D), torch.float16)[:, : self.Sq] = found


SHAPES = {  # and rows of a forward tile, block_kv, block_q of a backward tile
    "D64": (dict(D=64, Sq=256), (192, 128, 128)),
    "D64_short": (dict(D=64, Sq=40, Sk=70), (192, 128, 128)),
    "D128_ragged": (dict(D=128, Sq=131, Sk=203), (128, 128, 64)),
}


def prepared(name: str):
    shape, blocks = SHAPES[name]
    tensors = qkv(0, torch.float16, B=1, H=2, Hk=1, grad=False, **shape)
    return tensors, Attention(*tensors, *blocks, right=0)


@pytest.mark.parametrize("name", SHAPES)
def test_forward(name, played):
    (q, k, v), player = prepared(name)
    program = lower(kernels.forward, [*structs(q.shape, k.shape, v.shape), *[None] * 9], options=Options(right=0))
    played(player.forward)
    launch = direct.Launch(program, CPU)
    out, lse = launch.run(Operands(q, k, v))
    assert out.is_contiguous() and lse.is_contiguous()
    expected = by_definition(q.double(), k.double(), v.double(), right=0)
    torch.testing.assert_close(out.double(), expected[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-5)
    # Memory that a kernel cannot read as it is.
    sliced = torch.stack([k, v], dim=2)
    odd = torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape)
    again = launch.run(Operands(odd, sliced[:, :, 0], sliced[:, :, 1]))
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    assert again[0].data_ptr() != out.data_ptr()


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_backward(name, with_lse, played):
    tensors, player = prepared(name)
    q, k, v = (x.double().requires_grad_() for x in tensors)
    out, lse = by_definition(q, k, v, right=0)
    d_out, d_lse = cotangent(out, 1).half(), cotangent(lse, 2).float() if with_lse else None
    cotangents = [d_out.double(), torch.zeros_like(lse) if d_lse is None else d_lse.double()]
    expected = torch.autograd.grad([out, lse], [q, k, v], cotangents)

    rows = [d_out, d_lse, out.detach().half(), lse.detach().float()]
    shapes = [*structs(out.shape), *structs(lse.shape, dtype=jnp.float32)] * 2
    if d_lse is None:
        shapes[1] = None
    arguments = [*shapes, *structs(*(x.shape for x in tensors)), *[None] * 9]
    program = lower(kernels.backward, arguments, options=Options(right=0), bias_gradient=False)
    played(player.delta, player.backward, player.dq)
    found = direct.Launch(program, CPU).run((*rows, *tensors))
    for x, y in zip(found, expected, strict=True):
        assert x.is_contiguous()
        torch.testing.assert_close(x.double(), y, atol=2e-2, rtol=2e-2)

"""DTensor over two processes: the values and gradients of one, split where attention may be split."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from interop import flash_attn_func, ops
from interop.attention import attention
from interop.operands import Operands, Options
from tests.interop.cases import gradients, qkv

BATCH, HEADS, LENGTH, WHOLE = Shard(0), Shard(2), Shard(1), Replicate()
# name: (placement of q, k, v; of out; the operands besides)
CASES = {
    "batch": (BATCH, BATCH, ["bias", "sinks", "mask", "ids"]),
    "heads": (HEADS, HEADS, ["head_bias", "sinks", "mask", "ids"]),
    "length": (LENGTH, WHOLE, []),
}
OPTIONS = Options(right=0)


def operands(names, B=4, S=13, H=4):
    g = torch.Generator().manual_seed(1)
    every = {
        "bias": torch.randn(1, 1, S, S, generator=g).requires_grad_(),
        "head_bias": torch.randn(1, H, 1, S, generator=g).requires_grad_(),
        "sinks": torch.randn(1, H, generator=g)[0].requires_grad_(),
        "mask": torch.rand(B, 1, 1, S, generator=g) < 0.8,
        "ids": torch.randint(2, (B, S), generator=g),
    }
    return {name: every[name] for name in names}


def attend(q, k, v, bias=None, head_bias=None, sinks=None, mask=None, ids=None):
    segment_ids = None if ids is None else (ids, ids)
    bias = head_bias if bias is None else bias
    return attention(q, k, v, OPTIONS, bias=bias, sinks=sinks, attn_mask=mask, segment_ids=segment_ids)


def check(name: str, mesh) -> None:
    placed, expected_placement, names = CASES[name]
    tensors, others = qkv(0, B=4, Sq=13, H=4), operands(names)
    inputs = [*tensors, *(x for x in others.values() if x.requires_grad)]
    outputs = attend(*tensors, **others)
    expected = [*outputs, *gradients(outputs, inputs)]

    split = [distribute_tensor(x.detach(), mesh, [placed]).requires_grad_() for x in tensors]
    whole = {
        key: distribute_tensor(x.detach(), mesh, [WHOLE]).requires_grad_(x.requires_grad) for key, x in others.items()
    }
    found = attend(*split, **whole)
    assert found[0].placements == (expected_placement,), (name, found[0].placements)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(found)]
    weights = [distribute_tensor(w, mesh, x.placements) for w, x in zip(weights, found, strict=True)]
    split_inputs = [*split, *(x for x in whole.values() if x.requires_grad)]
    found = [*found, *torch.autograd.grad(found, split_inputs, weights)]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.full_tensor(), y, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")


def run(rank: int, port: int) -> None:
    import interop.sharding

    assert interop.sharding
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in CASES:
        check(name, mesh)
    dropout_is_not_split(mesh)
    groups_stay_together(mesh)
    dist.destroy_process_group()


def dropout_is_not_split(mesh) -> None:
    tensors, seed = qkv(0, B=4, Sq=13, grad=False), torch.tensor([[3, 4]], dtype=torch.int32)
    options = Options(dropout_p=0.5)
    expected, _ = ops.attention_forward(*Operands(*tensors, dropout_seed=seed), *options)
    split = [distribute_tensor(x, mesh, [BATCH]) for x in tensors]
    seed = distribute_tensor(seed, mesh, [WHOLE])
    found, _ = ops.attention_forward(*Operands(*split, dropout_seed=seed), *options)
    assert found.placements == (WHOLE,)
    assert torch.equal(found.to_local(), expected)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        flash_attn_func(*split, dropout_p=0.5)


def groups_stay_together(mesh) -> None:
    """Six query heads of three key/value heads are not split in two."""
    tensors = qkv(0, B=4, Sq=13, H=6, Hk=3, grad=False)
    found = flash_attn_func(*(distribute_tensor(x, mesh, [HEADS]) for x in tensors))
    assert found.placements != (HEADS,)
    torch.testing.assert_close(found.full_tensor(), flash_attn_func(*tensors), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run, (port,), nprocs=2)

"""Memory, order and life of what crosses from torch to JAX and back."""

import collections
import concurrent.futures
import gc
import os
import subprocess
import sys
import time
import weakref

import jax
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import interop
from interop import bridge, flash_attn_func, ops
from tests.interop.cases import qkv

CPU = torch.device("cpu")
SHAPE = (2, 16, 4, 8)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = {
    "transposed": lambda: random(2, 4, 16, 8).transpose(1, 2),
    "slice_of_qkv": lambda: random(2, 16, 3, 4, 8)[:, :, 1],
    "misaligned": lambda: random(2 * 16 * 4 * 8 + 1)[1:].view(SHAPE),
    "expanded": lambda: random(2, 16, 1, 8).expand(SHAPE),
    "every_other": lambda: random(2, 32, 4, 8)[:, ::2],
    "odd_stride_of_one_batch": lambda: random(1, 16, 4, 8).as_strided((1, 16, 4, 8), (7, 32, 8, 1)),
    "transposed_single_head": lambda: random(2, 1, 16, 8).transpose(1, 2),
    "lazily_negated": lambda: torch._neg_view(random(*SHAPE)),
}


def run(code: str) -> str:
    """stdout of a fresh interpreter without JAX's memory settings."""
    inherited = {name: x for name, x in os.environ.items() if name not in bridge.MEMORY_SETTINGS}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=inherited, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_reaches_jax_row_major(name):
    x = LAYOUTS[name]()
    before = x.clone()
    ready = bridge.canonical(x)
    assert ready.data_ptr() % 64 == 0
    (array,) = bridge.to_jax([ready], CPU)
    assert array.unsafe_buffer_pointer() == ready.data_ptr()
    assert array.format.layout.major_to_minor == (0, 1, 2, 3)
    (back,) = bridge.to_torch([array], CPU)
    assert torch.equal(back, before)
    expected = flash_attn_func(*(x.resolve_neg().contiguous().clone() for _ in range(3)), causal=True)
    assert torch.equal(flash_attn_func(x, x, x, causal=True), expected)
    assert torch.equal(x, before)


def test_layouts_share_one_compilation():
    q, k, v = qkv(0, grad=False)
    flash_attn_func(q, k, v)
    programs = ops.kernels().programs.total()
    q_aside, k_aside, v_aside = (torch.cat([x, x], dim=-1)[..., :16] for x in (q, k, v))
    misaligned = torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape)
    for tensors in ((q_aside, k_aside, v_aside), (misaligned, k, v), (q.clone().requires_grad_(), k, v)):
        flash_attn_func(*tensors)
    assert ops.kernels().programs.total() == programs


def test_entry_points_are_the_ones_asked_for():
    public = os.environ.get("JFLASH_PUBLIC_DLPACK") == "1"
    assert (bridge.entry_points(CPU) is None) == public


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int32])
def test_no_copy(dtype):
    x = (random(4, 64) * 10).to(dtype)
    (array,) = bridge.to_jax([x], CPU)
    assert array.unsafe_buffer_pointer() == x.data_ptr()
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    (back,) = bridge.to_torch([array], CPU)
    assert back.data_ptr() == x.data_ptr()
    assert back.dtype == dtype


def test_absent_tensors_stay_absent():
    x = random(3)
    array, nothing = bridge.to_jax([x, None], CPU)
    assert nothing is None
    assert array.tolist() == x.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_64_bits_are_never_truncated(dtype):
    x = torch.arange(5).to(dtype) * 2**30 + 1
    with pytest.raises(TypeError, match=f"dtype={dtype} needs jax_enable_x64"):
        bridge.to_jax([x], CPU)
    (y,) = bridge.call(lambda a: (a * 2,), [x])
    assert y.dtype == dtype
    assert torch.equal(y, x * 2)
    assert not jax.config.jax_enable_x64


def test_inputs_are_released():
    freed = []
    x = random(1, 256, 4, 16)
    weakref.finalize(x.untyped_storage(), freed.append, True)
    out = flash_attn_func(x, x, x)
    del x
    patience = time.monotonic() + 30
    while not freed and time.monotonic() < patience:  # a thread of XLA's lets go last
        time.sleep(0.01)
    assert freed
    assert torch.isfinite(out).all()


def test_outputs_are_released():
    q, k, v = qkv(1, grad=False)
    freed = []
    out = flash_attn_func(q, k, v)
    weakref.finalize(out.untyped_storage(), freed.append, True)
    view = out[0]
    del out
    gc.collect()
    assert not freed
    del view
    gc.collect()
    assert freed


def test_inputs_may_change_after_the_call():
    q, k, v = qkv(2, grad=False)
    out = flash_attn_func(q, k, v)
    before = out.clone()
    for x in (q, k, v):
        x.fill_(7)
    assert torch.equal(out, before)


def test_saved_inputs_may_not_change():
    q, k, v = qkv(3)
    work = q * 1
    out = flash_attn_func(work, k, v)
    work.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


def test_outputs_may_change():
    """Writing into one leaves the next result alone, though XLA thinks the memory immutable."""
    q, k, v = qkv(4, grad=False)
    out = flash_attn_func(q, k, v)
    expected = out.clone()
    out.zero_()
    assert torch.equal(flash_attn_func(q, k, v), expected)


class Event:
    """A torch.cuda.Event that is over when told."""

    over = False

    def query(self):
        return self.over


def test_buried_arrays_wait_for_their_event(monkeypatch):
    first, second = Event(), Event()
    monkeypatch.setattr(bridge, "graveyard", collections.deque([("a", CPU, first), ("b", CPU, second)]))
    second.over = True
    bridge.sweep()
    assert [name for name, *_ in bridge.graveyard] == ["a", "b"]
    first.over = True
    bridge.sweep()
    assert not bridge.graveyard


def test_array_buried_in_a_graph_capture_gets_its_event_later(monkeypatch):
    monkeypatch.setattr(bridge, "graveyard", collections.deque([("a", CPU, None)]))
    monkeypatch.setattr(bridge, "bury", lambda x, d: bridge.graveyard.append((x, d, Event())))
    bridge.sweep()
    ((name, _, event),) = bridge.graveyard
    assert name == "a"
    assert isinstance(event, Event)


@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_jax_lacks_is_given_back(monkeypatch, times):
    """What torch has read or keeps unused, once; an error that stays is JAX's own."""
    seen, read = [], Event()
    read.over = True
    monkeypatch.setattr(bridge, "graveyard", collections.deque([("a", CPU, read)]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("emptied"))

    def hungry(x):
        if len(seen) < times:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64 bytes")
        return (x + 1,)

    x = random(3)
    if times == 1:
        assert torch.equal(bridge.call(hungry, [x])[0], x + 1)
    else:
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            bridge.call(hungry, [x])
    assert seen == ["emptied"]
    assert not bridge.graveyard


def test_threads():
    q, k, v = qkv(5)
    out = flash_attn_func(q, k, v)
    (expected,) = torch.autograd.grad(out.square().sum(), q)

    def one(_):
        return torch.autograd.grad(flash_attn_func(q, k, v).square().sum(), q)[0]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(x, expected) for x in pool.map(one, range(24)))


def test_fake_tensor_is_refused():
    with FakeTensorMode():
        x = torch.randn(SHAPE)
        assert flash_attn_func(x, x, x).shape == SHAPE  # the operator has a fake implementation
        with pytest.raises(TypeError, match="FakeTensor has no memory"):
            bridge.to_jax([x], CPU)


def test_devices_must_agree():
    x = random(*SHAPE)
    with pytest.raises(ValueError, match="devices cpu and meta of the tensors must be equal"):
        bridge.call(lambda a, b: (a,), [x, x.to("meta")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="JAX may have CUDA here")
def test_cuda_tensors_need_a_jax_with_cuda():
    with pytest.raises(RuntimeError, match=r"device=cuda:0 .* must be a device of JAX too.*jax\[cuda13\]"):
        bridge.jax_device(torch.device("cuda", 0))


def test_importing_interop_imports_no_jax_and_changes_nothing():
    code = (
        "import os, sys, torch\n"
        "before = dict(os.environ), torch.nn.functional.scaled_dot_product_attention\n"
        "import interop\n"
        "assert not {'jax', 'jaxlib', 'jflash'} & set(sys.modules)\n"
        "assert before == (dict(os.environ), torch.nn.functional.scaled_dot_product_attention)\n"
        "print('ok')"
    )
    assert run(code) == "ok"


def test_jflash_torch_is_interop():
    import jflash.torch

    assert jflash.torch.__all__ == interop.__all__
    assert all(getattr(jflash.torch, name) is getattr(interop, name) for name in interop.__all__)


def test_jflash_imports_no_torch():
    assert run("import sys, jflash; print('torch' in sys.modules)") == "False"


def test_jax_memory_is_not_preallocated_unless_asked():
    code = (
        "import os, sys, types\n"
        "sys.modules['jax'] = types.ModuleType('jax')\n"
        "from interop import bridge\n"
        "for setting in ({}, *({name: '.4'} for name in bridge.MEMORY_SETTINGS)):\n"
        "    os.environ.pop('XLA_PYTHON_CLIENT_PREALLOCATE', None)\n"
        "    os.environ.update(setting)\n"
        "    bridge.load_jax.cache_clear()\n"
        "    bridge.load_jax()\n"
        "    print(os.environ.get('XLA_PYTHON_CLIENT_PREALLOCATE'), end=' ')\n"
        "    for name in setting: del os.environ[name]"
    )
    assert run(code) == "false .4 None None"


def test_first_call_is_before_any_jax_device():
    """JAX reads its memory settings when it first touches a device, so they must be there by then."""
    code = (
        "import os, torch, interop\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "q = torch.randn(1, 4, 1, 8)\n"
        "assert interop.flash_attn_func(q, q, q).shape == q.shape\n"
        "print(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])"
    )
    assert run(code) == "false"


@pytest.mark.skipif(os.environ.get("JFLASH_PUBLIC_DLPACK") == "1", reason="this is that run")
def test_all_of_this_over_the_public_entry_points():
    """Copies, lives and types once more, over `jax.dlpack`."""
    kept = "transposed or negated or copy or entry or released or 64 or absent"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", kept]
    found = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JFLASH_PUBLIC_DLPACK": "1"}, check=False
    )
    assert found.returncode == 0, found.stdout
    assert " passed" in found.stdout

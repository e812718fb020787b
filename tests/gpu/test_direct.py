"""Kernels that torch launches by itself: the bridge's bits, on any stream, in CUDA graphs, in torch's memory."""

import functools
import itertools
import subprocess
import sys
import threading
import warnings

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a torch with CUDA", allow_module_level=True)

from interop import (  # noqa: E402
    bridge,
    direct,
    flash_attn_func,
    flash_attn_varlen_func,
    lengths,
    scaled_dot_product_attention,
)
from interop.attention import attention  # noqa: E402
from interop.operands import Options  # noqa: E402

jax = bridge.load_jax()

CUDA = torch.device("cuda", 0)
SHORT = 20_000_000  # cycles of sleep: about 10 ms
if jax.__version_info__ not in direct.VERSIONS:
    pytest.skip(f"jax=={jax.__version__} is not known to interop.direct", allow_module_level=True)


@pytest.fixture(autouse=True)
def no_surprise(monkeypatch):
    """Lengths as they are, and no fallback."""
    monkeypatch.setenv("JFLASH_EXACT_LENGTHS", "1")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="jflash calls kernels through XLA")
        yield


def qkv(seed=0, dtype=torch.bfloat16, *, B=2, Sq=512, Sk=None, H=4, Hk=2, D=64, grad=False, device=CUDA):
    g = torch.Generator(device).manual_seed(seed)
    shapes = (B, Sq, H, D), (B, Sk or Sq, Hk, D), (B, Sk or Sq, Hk, D)
    return [torch.randn(s, generator=g, dtype=dtype, device=device).requires_grad_(grad) for s in shapes]


def launched() -> int:
    """How many kinds of calls torch launches so far."""
    return sum(launch is not None for launch in direct.launches.values())


def bridged(monkeypatch, function):
    """function() with every call by the bridge."""
    with monkeypatch.context() as patch:
        patch.setattr(direct, "launches", {})
        patch.setattr(direct, "VERSIONS", ())
        found = function()
        assert not any(direct.launches.values())
        return found


def results(tensors, **options):
    """out, lse and gradients under a random weighting of both."""
    out, lse, _ = flash_attn_func(*tensors, **options, return_attn_probs=True)
    g = torch.Generator(CUDA).manual_seed(99)
    weights = [torch.randn(x.shape, generator=g, dtype=x.dtype, device=x.device) for x in (out, lse)]
    return [out, lse, *torch.autograd.grad([out, lse], tensors, weights)]


def test_works():
    assert direct.works(CUDA)


CASES = {
    "D64": ({}, {}),
    "D64_causal": ({}, {"causal": True}),
    "D128": ({"D": 128}, {}),
    "D128_causal": ({"D": 128}, {"causal": True}),
    "equal_heads": ({"Hk": 4}, {"causal": True}),
    "one_kv_head": ({"Hk": 1}, {"causal": True}),
    "ragged": ({"Sq": 331, "Sk": 500}, {"causal": True}),
    "ragged_D128": ({"Sq": 131, "Sk": 77, "D": 128}, {}),
    "short": ({"Sq": 5, "Sk": 9}, {}),
    "D40": ({"D": 40}, {"causal": True}),
    "D96_window": ({"D": 96}, {"window_size": (100, 30)}),
    "softcap": ({}, {"softcap": 5.0, "softmax_scale": 0.3}),
    "deterministic": ({"D": 128, "Sq": 700}, {"causal": True, "deterministic": True}),
    "float16": ({"dtype": torch.float16}, {"causal": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_bridge(name, monkeypatch):
    shape, options = CASES[name]
    tensors = qkv(1, grad=True, **shape)
    expected = bridged(monkeypatch, lambda: results(tensors, **options))
    monkeypatch.setattr(direct, "launches", {})
    for _ in range(2):  # the second is a repeated call
        found = results(tensors, **options)
        for what, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
            assert x.is_contiguous()
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            if what == "dq" and not options.get("deterministic") and tensors[1].shape[1] > 128:
                torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)  # summed in no fixed order
            else:
                assert torch.equal(x, y), f"{what}: max|difference| = {(x.float() - y.float()).abs().max()}"
    assert launched() == 2, "the bridge took a call"


@pytest.mark.parametrize("name", ["D64_causal", "D128"])
def test_follows_torch(name):
    """Many blocks, against torch's own attention in float32."""
    shape, options = CASES[name]
    q, k, v = qkv(2, **{**shape, "Sq": 1111, "Hk": 4})
    found = flash_attn_func(q, k, v, **options).transpose(1, 2)
    heads_first = (x.transpose(1, 2).float() for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal="causal" in options)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def test_layouts_and_alignments():
    q, k, v = qkv(3, Hk=4)
    expected = flash_attn_func(q, k, v, causal=True)
    before = launched()
    packed = torch.stack([q, k, v], dim=2)
    odd = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    assert odd[0].data_ptr() % 256
    assert torch.equal(flash_attn_func(*packed.unbind(2), causal=True), expected)
    assert torch.equal(flash_attn_func(*odd, causal=True), expected)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(flash_attn_func(*heads_first, causal=True), expected)
    assert launched() == before


def test_torch_owns_the_results():
    q, k, v = qkv(4)
    flash_attn_func(q, k, v)
    before, buried = torch.cuda.memory_allocated(), len(bridge.graveyard)
    out = flash_attn_func(q, k, v)
    assert torch.cuda.memory_allocated() >= before + out.nbytes
    del out
    assert len(bridge.graveyard) == buried
    assert torch.cuda.memory_allocated() == before


def test_side_stream():
    """Work is queued on the current stream and nowhere else: after a slow producer there, with no wait."""
    q, k, v = qkv(5, grad=True)
    d_out = torch.randn_like(q)

    def step():
        out = flash_attn_func(q, k, v)
        return out, *torch.autograd.grad(out, (k, v), d_out)

    expected = [x.detach() for x in step()]  # its graph would make autograd wait on the stream it was made on
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(side), torch.no_grad():
            slow = torch.full_like(q, torch.nan)
            torch.cuda._sleep(SHORT)
            slow.copy_(q)
        with torch.cuda.stream(side):
            slow.requires_grad_()
            out = flash_attn_func(slow, k, v)
            grads = torch.autograd.grad(out, (k, v), d_out)
            assert torch.cuda.default_stream().query(), "something waits on the default stream"
        side.synchronize()
        assert all(torch.equal(x, y) for x, y in zip((out, *grads), expected, strict=True))


def test_inputs_may_go_early():
    """Freed at once and their memory written by others on the same stream."""
    tensors = qkv(6, Sq=2048)
    expected = flash_attn_func(*tensors)
    for _ in range(20):
        torch.cuda._sleep(SHORT // 4)
        copies = [x.clone() for x in tensors]
        out = flash_attn_func(*copies)
        del copies
        junk = [torch.full_like(tensors[0], torch.nan) for _ in range(4)]
        assert torch.equal(out, expected)
        del junk


def test_scratch_may_go_early():
    """So is the backward's scratch memory, as soon as it returns."""
    q, k, v = qkv(7, Sq=2048, grad=True)
    d_out = torch.randn_like(q)
    expected = torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), d_out)
    for _ in range(10):
        out = flash_attn_func(q, k, v)
        torch.cuda._sleep(SHORT // 4)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), d_out)
        junk = [torch.full((2, 4, 2048, 64), torch.nan, device=CUDA) for _ in range(4)]
        torch.testing.assert_close(dq, expected[0], atol=2e-2, rtol=2e-2)
        assert all(map(torch.equal, (dk, dv), expected[1:]))
        del junk


@pytest.mark.parametrize("name", ["D64_causal", "D128", "ragged"])
def test_capture_and_replay(name):
    """A graph of forward and backward gives, with new inputs, the bits of new calls."""
    shape, options = CASES[name]
    options = {**options, "deterministic": True}
    tensors = qkv(8, grad=True, **shape)
    d_out = torch.randn_like(tensors[0])

    def step():
        out, lse, _ = flash_attn_func(*tensors, **options, return_attn_probs=True)
        return [out, lse, *torch.autograd.grad(out, tensors, d_out)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        with torch.no_grad():
            for x, y in zip(tensors, qkv(20 + seed, **shape), strict=True):
                x.copy_(y)
            d_out.normal_()
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.clone() for x in captured]
        for what, x, y in zip(("out", "lse", "dq", "dk", "dv"), replayed, step(), strict=True):
            assert torch.equal(x, y), f"{what} of replay {seed}"
    del graph, captured
    assert all(torch.isfinite(x).all() for x in step())


def packed(seed, lengths, **shape):
    """q, k, v of sequences one after another, and where each starts."""
    tensors = [x[0].detach().requires_grad_() for x in qkv(seed, B=1, Sq=sum(lengths), **shape)]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=CUDA)
    return tensors, starts


def with_gradients(attend, tensors, seed=99):
    """A result and the gradients under a random weighting of it."""
    out = attend(*tensors)
    g = torch.Generator(CUDA).manual_seed(seed)
    weight = torch.randn(out.shape, generator=g, dtype=out.dtype, device=CUDA)
    return [out, *torch.autograd.grad(out, tensors, weight)]


def padded(q, k, v):
    return flash_attn_func(q, k, v, causal=True, deterministic=True)


def with_sinks(q, k, v):
    return attention(q, k, v, Options(right=0, deterministic=True), sinks=torch.linspace(-1, 1, 4, device=CUDA))[0]


def segmented(q, k, v):
    ids = (torch.arange(q.shape[1], device=CUDA) // 90).expand(q.shape[:2])
    return attention(q, k, v, Options(right=0, deterministic=True), segment_ids=(ids, ids))[0]


@pytest.mark.parametrize("name", ["packed", "packed_D128", "padded", "sinks", "segments"])
def test_bits_of_the_bridge_with_integers_between(name, monkeypatch):
    """Torch does what lies between the kernels: tables of sequences and segments, the factor of sinks."""
    monkeypatch.setattr(direct, "launches", {})
    attend, kinds = {"padded": (padded, 2), "sinks": (with_sinks, 1), "segments": (segmented, 2)}.get(name, (None, 2))
    if attend is None:
        tensors, starts = packed(15, [300, 0, 77, 1, 456], D=128 if name == "packed_D128" else 64)
        attend = functools.partial(_varlen, starts)
    else:
        tensors = qkv(15, Sq=331, Hk=4, grad=True)
    if name == "padded":
        monkeypatch.delenv("JFLASH_EXACT_LENGTHS")
        monkeypatch.setattr(lengths, "first", {})
        with_gradients(padded, qkv(15, Sq=200, Hk=4, grad=True))  # comes first, and runs as it is
    expected = bridged(monkeypatch, lambda: with_gradients(attend, tensors))
    before = launched()
    for _ in range(2):
        for what, x, y in zip(("out", "dq", "dk", "dv"), with_gradients(attend, tensors), expected, strict=True):
            assert torch.equal(x, y), f"{what}: max|difference| = {(x.float() - y.float()).abs().max()}"
    assert launched() - before == kinds, "the bridge took a call"


def _varlen(starts, q, k, v):
    return flash_attn_varlen_func(q, k, v, starts, starts, causal=True, deterministic=True)


def test_capture_of_packed_sequences():
    """A replay follows the values of cu_seqlens."""
    tensors, starts = packed(16, [100, 200, 84])
    weight = torch.randn_like(tensors[0])

    def step():
        out = _varlen(starts, *tensors)
        return [out, *torch.autograd.grad(out, tensors, weight)]

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured = step()
    for others in ([384, 0, 0], [1, 2, 381], [128, 128, 100]):
        starts.copy_(torch.tensor([0, *itertools.accumulate(others)], dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        replayed = [x.clone() for x in captured]
        assert all(map(torch.equal, replayed, step()))


def test_capture_of_a_call_that_never_ran():
    q, k, v = qkv(9, Sq=448)
    x, first, second = torch.zeros(8, device=CUDA), torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        x += 1
        with pytest.raises(RuntimeError) as raised:
            flash_attn_func(q, k, v)
    assert "cannot be captured in a CUDA graph" in str(raised.value)
    expected = flash_attn_func(q, k, v)
    with torch.cuda.graph(second):
        out = flash_attn_func(q, k, v)
    second.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_host_does_not_wait():
    tensors = qkv(10, grad=True)
    d_out = torch.randn_like(tensors[0])
    for _ in range(2):  # the first compiles
        torch.autograd.grad(flash_attn_func(*tensors), tensors, d_out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(20 * SHORT)
        torch.autograd.grad(flash_attn_func(*tensors), tensors, d_out)
        busy = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert busy, "the host waited for the GPU"


def test_threads():
    """A thread of its own, with no CUDA context before the call; several at once, each on its stream."""
    q, k, v = qkv(11)
    expected = flash_attn_func(q, k, v)
    torch.cuda.synchronize()
    found: dict[int, object] = {}

    def work(n):
        try:
            with torch.cuda.stream(streams[n]):
                for _ in range(20):
                    found[n] = flash_attn_func(q, k, v)
        except Exception as error:
            found[n] = error

    streams = [torch.cuda.Stream() for _ in range(4)]
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert all(isinstance(x, torch.Tensor) and torch.equal(x, expected) for x in found.values()), found


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode, monkeypatch):
    tensors = qkv(12, grad=True)

    def f(q, k, v):
        return flash_attn_func(q * 2, k, v, causal=True) * 2

    f(*tensors).sum().backward()
    monkeypatch.setattr(bridge, "call", None)  # nobody is to need it
    compiled = torch.compile(f, fullgraph=True, mode=mode)
    for _ in range(4):
        found = compiled(*tensors)
        d_out = torch.randn_like(found)
        grads = torch.autograd.grad(found, tensors, d_out)
        expected = f(*tensors)
        assert torch.equal(found, expected)
        for x, y in zip(grads, torch.autograd.grad(expected, tensors, d_out), strict=True):
            torch.testing.assert_close(x, y, atol=5e-2, rtol=5e-2)


def test_sdpa_and_inference_mode():
    tensors = [x.transpose(1, 2) for x in qkv(13, Hk=4)]
    expected = scaled_dot_product_attention(*tensors, is_causal=True)
    with torch.inference_mode():
        found = scaled_dot_product_attention(*tensors, is_causal=True)
    assert found.is_inference()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    """Each with kernels of its own, whichever is current."""
    torch.cuda.set_device(0)  # JAX, which these tests have started, leaves its last device current
    tensors = qkv(14, grad=True)
    expected = results(tensors, deterministic=True)
    other = torch.device("cuda", 1)
    there = [x.detach().to(other).requires_grad_() for x in tensors]
    g = torch.Generator(CUDA).manual_seed(99)
    weights = [torch.randn(x.shape, generator=g, dtype=x.dtype, device=CUDA).to(other) for x in expected[:2]]
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            out, lse, _ = flash_attn_func(*there, deterministic=True, return_attn_probs=True)
            found = [out, lse, *torch.autograd.grad([out, lse], there, weights)]
            assert torch.cuda.current_device() == current
        assert all(x.device == other and torch.equal(x.to(CUDA), y) for x, y in zip(found, expected, strict=True))
    assert direct.works(other)
    assert torch.equal(flash_attn_func(*tensors, deterministic=True), expected[0])


FORK = """
import os, signal, sys, time, torch, warnings
from interop import bridge
bridge.jax_device(torch.device("cuda", 0))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    child = os.fork()
    if child == 0:
        os._exit(0)
print([str(w.message) for w in seen], flush=True)
time.sleep(1)
os.kill(child, signal.SIGKILL)  # it may have stopped at a lock that a thread of the parent held
os._exit(0)
"""


def test_a_fork_warns(tmp_path):
    """JAX says that its threads and a fork do not go together."""
    said = tmp_path / "said"  # a file, for a pipe would stay open as long as the child lives
    with said.open("w") as file:
        subprocess.run([sys.executable, "-c", FORK], stdout=file, stderr=file, timeout=40, check=False)
    assert "JAX is multithreaded" in said.read_text(), said.read_text()[-2000:]

"""torch tensors on the device: memory, streams and lives, and the same bits as JAX.

Every wait below is on a stream; the slow work is torch.cuda._sleep, so that a missing wait shows.
"""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a torch with CUDA", allow_module_level=True)

import jflash  # noqa: E402
from interop import bridge, direct, flash_attn_func, flash_attn_qkvpacked_func, scaled_dot_product_attention  # noqa: E402
from tests.oracle import assert_close  # noqa: E402

bridge.load_jax()  # its memory settings must be there before JAX looks at the GPU
CUDA = torch.device("cuda", 0)
SHORT, LONG = 20_000_000, 2_000_000_000  # cycles of sleep: about 10 ms and 1 s


def qkv(seed=0, dtype=torch.bfloat16, *, B=2, Sq=331, Sk=None, H=4, Hk=2, D=64, grad=True, device=CUDA):
    g = torch.Generator(device).manual_seed(seed)
    shapes = (B, Sq, H, D), (B, Sk or Sq, Hk, D), (B, Sk or Sq, Hk, D)
    return [torch.randn(s, generator=g, dtype=dtype, device=device).requires_grad_(grad) for s in shapes]


def to_jax(x: "torch.Tensor") -> jax.Array:
    dtype = jnp.dtype(str(x.dtype).removeprefix("torch."))
    return jax.device_put(np.asarray(x.detach().float().cpu()).astype(dtype), jax.devices("gpu")[0])


def same(x: "torch.Tensor", y: jax.Array) -> bool:
    return np.array_equal(x.detach().float().cpu().numpy(), np.asarray(y, np.float32))


def test_no_copy():
    x = torch.randn(4, 1024, device=CUDA)
    (array,) = bridge.to_jax([x], CUDA)
    assert array.unsafe_buffer_pointer() == x.data_ptr()
    (back,) = bridge.to_torch([array], CUDA)
    assert back.data_ptr() == x.data_ptr()
    assert bridge.entry_points(CUDA) is not None, "JAX's entry points below jax.dlpack have changed"


CASES = {
    "D64": (torch.bfloat16, {}, {}),
    "D128_causal": (torch.bfloat16, {"D": 128, "Sk": 500}, {"causal": True}),
    "float16": (torch.float16, {"Hk": 4}, {"causal": True}),
    "float32": (torch.float32, {"Sq": 130, "D": 40}, {"causal": True, "softcap": 5.0}),
    "deterministic": (torch.bfloat16, {}, {"causal": True, "deterministic": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_jax(name, monkeypatch):
    monkeypatch.setenv("JFLASH_EXACT_LENGTHS", "1")
    dtype, shape, options = CASES[name]
    tensors = qkv(1, dtype, **shape)
    out, lse, _ = flash_attn_func(*tensors, **options, return_attn_probs=True)
    weights = [torch.randn_like(out), torch.randn_like(lse)]
    ours = [out, lse, *torch.autograd.grad([out, lse], tensors, weights)]
    outputs, pull = jax.vjp(lambda *a: jflash.flash_attention(*a, **options, return_lse=True), *map(to_jax, tensors))
    for x, y, what in zip(
        ours, (*outputs, *pull(tuple(map(to_jax, weights)))), ("out", "lse", "dq", "dk", "dv"), strict=True
    ):
        if what == "dq" and dtype != torch.float32 and not options.get("deterministic"):
            # Summed in no fixed order.
            np.testing.assert_allclose(x.float().cpu().numpy(), np.asarray(y, np.float32), atol=2e-2)
        else:
            assert same(x, y), what


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
def test_matches_torch(D, causal):
    tensors = qkv(2, D=D)
    weight = torch.randn(tensors[0].shape, device=CUDA, dtype=torch.bfloat16)

    def results(attend, inputs):
        q, k, v = (x.transpose(1, 2) for x in inputs)
        out = attend(q, k, v, is_causal=causal, enable_gqa=True)
        return [out, *torch.autograd.grad(out, inputs, weight.to(out.dtype).transpose(1, 2))]

    wide = [x.detach().double().requires_grad_() for x in tensors]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        low = results(torch.nn.functional.scaled_dot_product_attention, tensors)
        ref = results(torch.nn.functional.scaled_dot_product_attention, wide)
    ours = results(scaled_dot_product_attention, tensors)
    for name, *arrays in zip(("out", "dq", "dk", "dv"), ours, low, ref, strict=True):
        assert_close(name, *(x.detach().double().cpu().numpy() for x in arrays), jnp.bfloat16)


def test_dropout_draws_on_the_device(monkeypatch):
    monkeypatch.setenv("JFLASH_EXACT_LENGTHS", "1")
    tensors = qkv(3, grad=False)
    cpu_state = torch.get_rng_state()
    torch.cuda.manual_seed_all(4)  # JAX, which these tests have started, leaves its last device current
    words = torch.randint(-(2**31), 2**31, (1, 2), dtype=torch.int32, device=CUDA)
    torch.cuda.manual_seed_all(4)
    out = flash_attn_func(*tensors, dropout_p=0.3)
    assert torch.equal(torch.get_rng_state(), cpu_state)
    key = jax.random.wrap_key_data(jnp.asarray(words[0].cpu().numpy().view(np.uint32)), impl="threefry2x32")
    expected = jflash.flash_attention(*map(to_jax, tensors), dropout_rate=0.3, dropout_key=key)
    assert same(out, expected)


def test_layouts_and_alignments():
    q, k, v = qkv(5, Hk=4, grad=False)
    expected = flash_attn_func(q, k, v, causal=True)
    packed = torch.stack([q, k, v], dim=2)
    misaligned = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert misaligned[0].data_ptr() % 256
    assert torch.equal(flash_attn_qkvpacked_func(packed, causal=True), expected)
    assert torch.equal(flash_attn_func(*misaligned, causal=True), expected)
    assert torch.equal(flash_attn_func(*heads_first, causal=True), expected)


def test_waits_for_a_slow_producer_on_another_stream():
    side = torch.cuda.Stream()
    q, k, _ = qkv(6, grad=False)
    v = torch.zeros_like(k)
    flash_attn_func(q, k, v)
    torch.cuda.synchronize()
    sums = []
    with torch.cuda.stream(side):
        for i in range(1, 21):
            torch.cuda._sleep(SHORT)
            v.fill_(i)
            sums.append(flash_attn_func(q, k, v).float().mean())
    side.synchronize()
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.arange(1.0, 21), atol=0, rtol=2e-2)


def test_backward_waits_on_the_stream_of_its_forward():
    side = torch.cuda.Stream()
    tensors = qkv(7)
    expected = torch.autograd.grad(flash_attn_func(*tensors), tensors[1:], torch.ones_like(tensors[0]) * 3)
    torch.cuda.synchronize()
    for _ in range(10):
        with torch.cuda.stream(side):
            out = flash_attn_func(*tensors)
            d_out = torch.zeros_like(out)
            torch.cuda._sleep(SHORT)
            d_out.fill_(3)
            found = torch.autograd.grad(out, tensors[1:], d_out)
        side.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_host_does_not_wait():
    q, k, v = qkv(8)
    torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), torch.randn_like(q))
    d_out = torch.randn_like(q)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    start = time.perf_counter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(flash_attn_func(q, k, v, dropout_p=0.0), (q, k, v), d_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    took = time.perf_counter() - start
    busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert busy, "the sleep was over: this showed nothing"
    assert took < 0.5, f"the host waited {took:.2f} s"


def test_inputs_may_go_or_change_after_the_call():
    """Freed at once and their memory taken by others; written in place on the same stream."""
    tensors = qkv(9, Sq=2048, grad=False)
    expected = flash_attn_func(*tensors)
    for _ in range(20):
        torch.cuda._sleep(SHORT)
        copies = [x.clone() for x in tensors]
        out = flash_attn_func(*copies)
        del copies
        junk = [torch.full_like(tensors[0], torch.nan) for _ in range(4)]
        assert torch.equal(out, expected)
        del junk
        copies = [x.clone() for x in tensors]
        torch.cuda._sleep(SHORT)
        out = flash_attn_func(*copies)
        for x in copies:
            x.fill_(torch.nan)
        assert torch.equal(out, expected)


def test_output_may_go_while_another_stream_reads_it():
    """JAX gets the memory of an output back only after the stream that was current when it went."""
    tensors, others = (qkv(n, torch.float32, Sq=2048, grad=False) for n in (10, 11))
    expected = flash_attn_func(*tensors)
    flash_attn_func(*others)
    side = torch.cuda.Stream()
    for _ in range(20):
        out = flash_attn_func(*tensors)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(SHORT)
            copy = out.clone()
            del out
        assert len(bridge.graveyard)
        for _ in range(6):  # would be given the memory of `out`
            flash_attn_func(*others)
        side.synchronize()
        assert torch.equal(copy, expected)
    torch.cuda.synchronize()
    flash_attn_func(*others)
    assert len(bridge.graveyard) <= 2


def test_jax_memory_does_not_grow():
    tensors = qkv(12, torch.float32, Sq=2048)

    def step():
        out = flash_attn_func(*tensors, causal=True)
        torch.autograd.grad(out, tensors, torch.randn_like(out))
        torch.cuda.synchronize()
        return jax.local_devices()[0].memory_stats()["bytes_in_use"]

    first = [step() for _ in range(5)][-1]
    assert [step() for _ in range(20)][-1] <= first


def test_sdpa_of_51200_tokens():
    """The longest case of the tutorial on scaled_dot_product_attention, whose scores would take 1.3 TB."""
    g = torch.Generator(CUDA).manual_seed(19)
    q, k, v = (torch.randn(32, 8, 51200, 64, dtype=torch.float16, device=CUDA, generator=g) for _ in range(3))
    out = scaled_dot_product_attention(q, k, v)
    assert out.shape == q.shape
    for b, h, i in ((0, 0, 0), (13, 3, 25001), (31, 7, 51199)):
        weights = (k[b, h].float() @ q[b, h, i].float() / 8).softmax(0)
        torch.testing.assert_close(out[b, h, i].float(), weights @ v[b, h].float(), atol=1e-3, rtol=2e-2)


def test_memory_that_torch_keeps_unused_is_jaxs_too():
    """Torch has held nearly all of the GPU and lets go of it, but not to the driver."""
    tensors = qkv(20, torch.float32, Sq=2048, D=256, grad=False)
    expected = flash_attn_func(*tensors)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - 2**28, dtype=torch.uint8, device=CUDA)
    del held
    assert torch.cuda.mem_get_info()[0] < 2**29
    others = [flash_attn_func(*tensors) for _ in range(256)]  # 16 MiB each: more than what is left
    assert all(torch.equal(x, expected) for x in others)


def test_graph_capture_raises():
    q, k, v = qkv(13, torch.float32, grad=False)  # which XLA runs
    out = flash_attn_func(q, k, v)
    expected = out.clone()
    x = torch.zeros(8, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            flash_attn_func(q, k, v)
        del out  # a result that goes during the capture leaves no event of the graph behind
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(flash_attn_func(q, k, v), expected)
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    tensors = qkv(14)

    def f(q, k, v):
        return flash_attn_func(q.sin(), k, v, causal=True) * 2

    compiled = torch.compile(f, fullgraph=True, mode=mode)
    for _ in range(4):
        found = compiled(*tensors)
        d_out = torch.randn_like(found)
        grads = torch.autograd.grad(found, tensors, d_out)
        expected = f(*tensors)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
        for x, y in zip(grads, torch.autograd.grad(expected, tensors, d_out), strict=True):
            torch.testing.assert_close(x, y, atol=5e-2, rtol=5e-2)


def test_cpu_tensors_stay_on_the_cpu():
    tensors = qkv(15, torch.float32, D=24, device=torch.device("cpu"))
    platforms = []

    def look(x):
        platforms.extend(device.platform for device in x.devices())
        return (x,)

    bridge.call(look, tensors[:1])
    assert platforms == ["cpu"]
    out = flash_attn_func(*tensors, causal=True)
    assert out.device.type == "cpu"
    (dq,) = torch.autograd.grad(out.square().sum(), tensors[0])
    expected = flash_attn_func(*(x.to(CUDA) for x in tensors), causal=True)
    torch.testing.assert_close(out, expected.cpu(), atol=1e-2, rtol=1e-2)
    assert torch.isfinite(dq).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("implementation", ["direct", "bridge"])
def test_second_gpu(implementation, monkeypatch):
    if implementation == "bridge":
        monkeypatch.setattr(direct, "VERSIONS", ())
    monkeypatch.setattr(direct, "launches", {})
    tensors = qkv(16, grad=False)
    torch.cuda.set_device(0)
    expected = flash_attn_func(*tensors)
    assert torch.cuda.current_device() == 0
    found = flash_attn_func(*(x.to("cuda:1") for x in tensors))
    assert found.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    assert torch.equal(found.to(CUDA), expected)


START = """
import torch
from interop import flash_attn_func
x = torch.randn(1, 128, 2, 64, dtype=torch.float16, device="cuda:0")
flash_attn_func(x, x, x)
print("current", torch.cuda.current_device())
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_first_call_leaves_the_device_current():
    """It starts JAX, which makes every GPU current in turn."""
    found = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == "current 0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_lengths_do_not_wait(dtype):
    """Lengths go to the device with the call: decoding against a growing cache never waits for the GPU."""
    q, k, v = qkv(17, dtype, Sq=1, Sk=300, grad=False)
    expected = [flash_attn_func(q, k[:, :n], v[:, :n]) for n in (70, 80, 90)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [flash_attn_func(q, k[:, :n], v[:, :n]) for n in (70, 80, 90)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    reference = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).float() for x in (q, k[:, :80], v[:, :80])), enable_gqa=True
    )
    torch.testing.assert_close(found[1].transpose(1, 2).float(), reference, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="needs torch 2.11")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_torchs_own_flash_backend(dropout_p):
    """Its values are those of interop's function, dropout replayed in the backward included."""
    from interop import sdpa_backend

    tensors = [x.detach().transpose(1, 2).requires_grad_() for x in qkv(18, Hk=4)]
    weight = torch.randn_like(tensors[0])

    def results(attend):
        torch.cuda.manual_seed(5)
        out = attend(*tensors, dropout_p=dropout_p, is_causal=True)
        return [out, *torch.autograd.grad(out, tensors, weight)]

    expected = results(scaled_dot_product_attention)
    torch.nn.attention.activate_flash_attention_impl(sdpa_backend.register())
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            found = results(torch.nn.functional.scaled_dot_product_attention)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)

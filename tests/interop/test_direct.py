"""Calls launched without XLA, as far as a CPU shows it: the kernels are played by Python functions on addresses."""

import contextlib
import ctypes
import functools
import math
import re
import struct
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from interop import (
    bridge,
    direct,
    flash_attn_func,
    kernels,
    key_ranges,
    l1_kernels,
    l1_ops,
    linear_kernels,
    linear_ops,
    programs,
)
from interop.operands import Operands, Options
from pallas_kernels.parts import ranges
from tests.interop.cases import Recorded, by_definition, cotangent, qkv
from tests.kernels.calls import identity, on_hopper

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


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    """Launches find the CPU current."""
    thread = SimpleNamespace(devices={None}, on=lambda device: contextlib.nullcontext())
    monkeypatch.setattr(direct, "_thread", thread)
    monkeypatch.setattr(direct, "_current_device", lambda: None)


@pytest.fixture
def played(monkeypatch):
    """played(*kernels): plays the kernels of a program, in their order, by functions of (inputs and outputs)."""

    def play(*players):
        queue = list(players)

        def compiled(module):
            assert isinstance(module, bytes)
            assert len(module) > 1000
            number = len(players) - len(queue)
            player = queue.pop(0)

            def launch(kernel, stream, addresses):
                assert (kernel, stream) == (number, 7)
                player(*struct.unpack(f"{len(addresses) // 8}P", addresses))

            return number, launch

        monkeypatch.setattr(direct, "_compile", compiled)
        monkeypatch.setattr(direct, "_stream", lambda index: 7)

    return play


class Attention:
    """The kernels of attention, played on memory of the shapes that they would see."""

    def __init__(self, q, k, v, *, rows, block_kv, block_q, **options):
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
        assert (lse[:, :, self.Sq :] == -math.inf).all()
        assert not d_lse[:, :, self.Sq :].any()
        memory(lse2, self.statistics, torch.float32)[:] = lse * LOG2E
        rows = torch.zeros(self.statistics)
        rows[:, :, : self.Sq] = (out.double() * d_out.double()).sum(-1).transpose(1, 2)
        memory(delta, self.statistics, torch.float32)[:] = rows - d_lse
        memory(dq, (*self.statistics, self.D), torch.float32)[:] = 0

    @torch.enable_grad()  # autograd runs this without
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


SHAPES = {  # and the tiles
    "D64": (dict(D=64, Sq=256), dict(rows=192, block_kv=128, block_q=128)),
    "D64_short": (dict(D=64, Sq=40, Sk=70), dict(rows=192, block_kv=128, block_q=128)),
    "D128_ragged": (dict(D=128, Sq=131, Sk=203), dict(rows=128, block_kv=128, block_q=64)),
}


def prepared(name: str):
    shape, blocks = SHAPES[name]
    tensors = qkv(0, torch.float16, B=1, H=2, Hk=1, grad=False, **shape)
    q, k, v = tensors
    return tensors, Attention(q, k, v, **blocks, right=0)


@pytest.mark.parametrize("name", SHAPES)
def test_forward(name, played):
    (q, k, v), player = prepared(name)
    program = lower(kernels.forward, [*structs(q.shape, k.shape, v.shape), *[None] * 8], options=Options(right=0))
    played(player.forward)
    launch = direct.Launch(program, CPU)
    out, lse = launch(Operands(q, k, v))
    assert out.is_contiguous()
    assert lse.is_contiguous()
    expected = by_definition(q.double(), k.double(), v.double(), right=0)
    torch.testing.assert_close(out.double(), expected[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-5)
    # Memory that a kernel cannot read as it is.
    sliced = torch.stack([k, v], dim=2)
    odd = torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape)
    again = launch(Operands(odd, sliced[:, :, 0], sliced[:, :, 1]))
    assert all(map(torch.equal, again, (out, lse)))
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
    given = [*structs(out.shape), *structs(lse.shape, dtype=jnp.float32)]
    arguments = [given[0], given[1] if with_lse else None, *given, *structs(*(x.shape for x in tensors)), *[None] * 8]
    program = lower(kernels.backward, arguments, options=Options(right=0), bias_gradient=False)
    played(player.delta, player.backward, player.dq)
    found = direct.Launch(program, CPU)((*rows, *tensors))
    for x, y in zip(found, expected, strict=True):
        assert x.is_contiguous()
        torch.testing.assert_close(x.double(), y, atol=2e-2, rtol=2e-2)


# --- what is read of a program, and what is refused


def kernel_text(function, arguments) -> list[str]:
    """The kernels in what JAX lowers a function to, with their types, in order."""
    with on_hopper():
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return [line.rsplit(" : ", 1)[1] for line in text.splitlines() if "custom_call @mosaic_gpu_v2" in line]


def types(text: str) -> list[tuple[int, ...]]:
    """Shapes of the results in `(operands) -> results`."""
    found = re.findall(r"tensor<([0-9x]+)x[a-z]+\d+>", text.split("->")[1])
    return [tuple(map(int, shape.split("x"))) for shape in found]


@pytest.mark.parametrize("options", [Options(), Options(left=40, right=0, softcap=5.0, deterministic=True)])
def test_as_jax_lowers_it(options):
    """The same kernels, in the order of JAX's text, with the outputs it gives them."""
    q, k = structs((2, 331, 4, 128), (2, 500, 2, 128))
    lse = jax.ShapeDtypeStruct((2, 4, 331), jnp.float32)
    forward = functools.partial(kernels.forward, options=options)
    backward = functools.partial(kernels.backward, options=options, bias_gradient=False)
    for function, arguments in ((forward, [q, k, k]), (backward, [q, None, q, lse, q, k, k])):
        arguments = [*arguments, *[None] * 8]
        expected = kernel_text(function, arguments)
        found = [step for step in lower(function, arguments).steps if isinstance(step.run, programs.Kernel)]
        assert len(found) == len(expected) > 0
        for step, text in zip(found, expected, strict=True):
            assert len(step.operands) == text.split("->")[0].count("tensor<")
            assert [shape for shape, _ in step.run.outputs] == types(text)
        in_place = [step.run.in_place for step in found if step.run.in_place]
        assert in_place == ([{2: 6}] if function is backward and not options.deterministic else [])


REFUSED = {
    "sums": lambda x: [identity(x + 2)],
    "an_argument": lambda x: [identity(x), x],
    "a_constant": lambda x: [identity(x), jnp.zeros(3)],
    "rounding": lambda x: [identity(x.astype(jnp.float16))],
    "steps": lambda x: [identity(x)[::2]],
    "float64": lambda x: [identity(x).astype(jnp.float64)],
    "no_kernel_at_all": lambda x: [jnp.cumsum(x)],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    with jax.enable_x64(name == "float64"), pytest.raises(programs.Unsupported):
        programs.lower(REFUSED[name], structs((256,), dtype=jnp.float32))


def test_moves(played):
    """Padding at both ends, cutting, new axes, constants: as JAX does them."""

    def around(kernel):
        def function(x, y):
            x = jnp.pad(x, ((1, 2), (0, 3)), constant_values=-7.0)
            fill = jnp.broadcast_to(jnp.asarray([[1.5], [2.5]], jnp.float32), (2, 3))
            return [kernel(x)[1:4, 2:5], kernel(y[None, :, 1:].reshape(2, 3)), kernel(jnp.pad(fill, ((0, 0), (1, 0))))]

        return function

    x, y = torch.randn(4, 5), torch.randn(2, 4)
    program = programs.lower(around(identity), structs((4, 5), (2, 4), dtype=jnp.float32))
    sizes = [7 * 8, 2 * 3, 2 * 4]
    played(*(functools.partial(lambda n, i, o: memory(o, (n,), torch.float32).copy_(memory(i, (n,), torch.float32)), n)
             for n in sizes))  # fmt: skip
    found = direct.Launch(program, CPU)([x, y])
    expected = around(lambda x: x)(jnp.asarray(x.numpy()), jnp.asarray(y.numpy()))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, torch.tensor(np.asarray(theirs)))


def tables(kernel):
    """What the kernels get for packed sequences."""

    def function(key_ranges):
        visits = ranges.table(key_ranges, 64, 128, 300)
        visitors = ranges.visitors(visits, 3)
        order = ranges.longest_first(visitors[..., 0], visitors[..., 1])
        sorted_sums = jnp.sort(visits.sum(axis=2) * jnp.any(visits > 1, axis=2) - jnp.all(visits > 0, axis=2))
        return [kernel(x) for x in (ranges.limits(key_ranges, 64), visits, visitors, order, sorted_sums)]

    return function


def test_operations_on_integers(played):
    """The tables of 200 queries in 5 sequences, and of as many in none: torch has JAX's bits."""
    starts = torch.tensor([0, 7, 7, 90, 155, 190], dtype=torch.int32)
    given = torch.cat([key_ranges.packed(starts, starts + 30, 200, 40, 3), torch.full((1, 3, 200), -1)]).int()
    program = programs.lower(tables(identity), structs(given.shape, dtype=jnp.int32))
    expected = [np.asarray(x) for x in tables(lambda x: x)(jnp.asarray(given.numpy()))]
    played(*(functools.partial(lambda n, i, o: memory(o, (n,), torch.int32).copy_(memory(i, (n,), torch.int32)), x.size)
             for x in expected))  # fmt: skip
    found = direct.Launch(program, CPU)([given])
    for ours, theirs in zip(found, expected, strict=True):
        assert (tuple(ours.shape), ours.dtype) == (theirs.shape, torch.int32)
        assert np.array_equal(ours.numpy(), theirs)


OTHER_OPERATIONS = {
    "sort_of_three": (lambda x: jax.lax.sort((x, x, x), num_keys=1)[2], "sort other than sort and argsort"),
    "product": (lambda x: x.prod(axis=1), "reduce of torch.int32 by stablehlo.multiply"),
    "least_from_three": (lambda x: jax.lax.reduce(x, np.int32(3), jax.lax.min, (1,)), "reduce from a value of its own"),
}


@pytest.mark.parametrize("name", OTHER_OPERATIONS)
def test_other_operations_are_refused(name):
    function, reason = OTHER_OPERATIONS[name]
    with pytest.raises(programs.Unsupported, match=reason):
        programs.lower(lambda x: [identity(function(x))], structs((2, 5), dtype=jnp.int32))


Q = jax.ShapeDtypeStruct((1, 512, 4, 128), jnp.bfloat16)
LSE = jax.ShapeDtypeStruct((1, 4, 512), jnp.float32)
INT = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
REAL = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
CACHE = jax.ShapeDtypeStruct((1, 1024, 4, 128), jnp.bfloat16)
DECODE = jax.ShapeDtypeStruct((1, 1, 4, 128), jnp.bfloat16), CACHE, CACHE, INT((1,)), None, None, None


def softmax(backward=False, **operands):
    x = Operands(Q, Q, Q, **operands)
    if backward:
        return functools.partial(kernels.backward, options=Options(), bias_gradient=False), (Q, None, Q, LSE, *x)
    return functools.partial(kernels.forward, options=Options()), x


def linear(decay=None):
    q = jax.ShapeDtypeStruct((4, 512, 16, 128), jnp.bfloat16)
    x = linear_ops.Operands(q, q, q, log_decay=decay)
    return functools.partial(linear_kernels.forward, options=linear_ops.Options()), x


def l1(dtype):
    q = jax.ShapeDtypeStruct((1, 512, 4, 64), dtype)
    x = l1_ops.Operands(q, q, q)
    return functools.partial(l1_kernels.forward, options=l1_ops.Options("attention")), x


LAUNCHED = {
    "packed or padded sequences": softmax(key_ranges=INT((1, 3, 512))),
    "their backward": softmax(backward=True, key_ranges=INT((1, 3, 512))),
    "segments and alibi, backward": softmax(
        backward=True, q_segment_ids=INT((1, 512)), kv_segment_ids=INT((1, 512)), alibi_slopes=REAL((1, 4))
    ),
    "sinks": softmax(sinks=REAL((1, 4))),
    "linear": linear(),
}
BRIDGED = {  # and the floating-point work that XLA does between the kernels
    "sinks, backward": (softmax(backward=True, sinks=REAL((1, 4))), "subtract of torch.float32"),
    "decode": ((functools.partial(kernels.with_cache, options=Options()), DECODE), "of torch.float32"),
    "linear with decay": (linear(REAL((16,))), "maximum"),
    "l1 in float32": (l1(jnp.float32), "reduce_precision"),
    "l1 in bfloat16": (l1(jnp.bfloat16), "reduce of torch.float32 by stablehlo.add"),
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_calls_that_torch_launches(name):
    program = lower(*LAUNCHED[name])
    assert any(isinstance(step.run, programs.Kernel) for step in program.steps)


@pytest.mark.parametrize(("name", "most"), [("packed or padded sequences", 26), ("their backward", 46)])
def test_few_operations_go_around_a_kernel(name, most):
    """Each costs the host some ten microseconds."""
    assert len(lower(*LAUNCHED[name]).steps) <= most


@pytest.mark.parametrize("name", BRIDGED)
def test_calls_that_stay_with_the_bridge(name):
    call, reason = BRIDGED[name]
    with pytest.raises(programs.Unsupported, match=reason):
        lower(*call)


def test_kernels_in_place():
    """Only on memory of the program's own that nothing else needs."""
    made = programs.Kernel(b"", (), {})
    adds = programs.Kernel(b"", (), {1: 0})
    given, scratch, other, total = (programs._Value() for _ in range(4))

    def check(operand, returned, after=()):
        steps = [(made, [given], [scratch]), (adds, [operand], [other, total]), *after]
        programs._check_memory(steps, returned)

    check(scratch, [other, total])
    for arguments in [(given, [total]), (torch.zeros(3), [total]), (scratch, [total, scratch])]:
        with pytest.raises(programs.Unsupported, match="in place"):
            check(*arguments)
    with pytest.raises(programs.Unsupported, match="in place"):
        check(scratch, [total], [(made, [scratch], [programs._Value()])])


# --- choosing between the launch and the bridge


class Bridge:
    """Stands for the bridge of a GPU, on CPU tensors that pass for CUDA's."""

    def __init__(self, monkeypatch):
        self.calls = 0
        monkeypatch.setattr(direct, "launches", {})
        monkeypatch.setattr(bridge, "call", self)
        monkeypatch.setattr(bridge, "common_device", lambda tensors: torch.device("cuda", 0))
        monkeypatch.setattr(bridge, "is_capturing", lambda device: False)
        monkeypatch.setattr(bridge, "jax_device", lambda device: jax.devices("cpu")[0])
        monkeypatch.setattr(direct, "VERSIONS", (jax.__version_info__,))
        monkeypatch.setattr(direct, "works", lambda device: True)
        monkeypatch.setattr(direct.Launch, "__init__", functools.partialmethod(_on_cpu, direct.Launch.__init__))

    def __call__(self, function, tensors, **static):
        self.calls += 1
        return [torch.full((3,), 5.0), torch.full((3,), 6.0)]


def _on_cpu(self, original, program, device):
    original(self, program, CPU)


def half(x):
    return [identity(x), identity(x)]


def attempt(x, function=half):
    return direct.call("key", function, [x])


@pytest.fixture
def bridged(monkeypatch):
    return Bridge(monkeypatch)


def plays_copy(n):
    return lambda i, o: memory(o, (n,), torch.float16).copy_(memory(i, (n,), torch.float16))


def test_launches_once_prepared(bridged, played):
    x = torch.randn(256).half()
    played(plays_copy(256), plays_copy(256))
    assert direct.again("key", [x]) is None
    for _ in range(2):
        found = attempt(x)
        assert all(map(torch.equal, found, (x, x)))
    again = direct.again("key", [x + 1])
    assert again is not None
    assert torch.equal(again[0], x + 1)
    assert bridged.calls == 0


def test_the_bridge_takes_the_rest(bridged, played, monkeypatch):
    x = torch.randn(256).half()
    played()
    for function in (REFUSED["sums"], REFUSED["no_kernel_at_all"]):
        for _ in range(2):
            assert attempt(x, function)[0][0] == 5
        assert direct.launches.pop("key") is None
    assert attempt(x.float())[0][0] == 5
    monkeypatch.setattr(direct, "VERSIONS", ((0, 1, 2),))
    direct.launches.clear()
    assert attempt(x)[0][0] == 5
    monkeypatch.setattr(bridge, "is_capturing", lambda device: True)
    direct.launches.clear()
    attempt(x)
    assert not direct.launches, "what a capture cannot do is no verdict"
    assert bridged.calls == 7


def test_jax_is_asked_with_the_device_current(bridged, played, monkeypatch):
    """It leaves that device current which it has worked on, and torch would go on there."""
    current = []

    @contextlib.contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    def asked(function, *args):
        assert current == [torch.device("cuda", 0)]
        return function(*args)

    monkeypatch.setattr(direct._thread, "on", on)
    for module, name in ((bridge, "jax_device"), (bridge, "load_jax"), (direct, "_lower"), (direct, "works")):
        monkeypatch.setattr(module, name, functools.partial(asked, getattr(module, name)))
    played(plays_copy(256), plays_copy(256))
    attempt(torch.randn(256).half())
    assert direct.launches["key"] is not None
    assert not current


@pytest.mark.parametrize("broken", ["_compile", "_lower"])
def test_a_surprise_is_said_and_survived(broken, bridged, monkeypatch):
    def fail(*_):
        raise AttributeError("no such name")

    monkeypatch.setattr(direct, broken, fail)
    with pytest.warns(UserWarning, match="through XLA.*no such name"):
        assert attempt(torch.zeros(256).half())[0][0] == 5
    with warnings.catch_warnings(action="error"):
        assert attempt(torch.zeros(256).half())[0][0] == 5  # said once


@pytest.mark.parametrize("wrong", [None, "bit", "error"])
def test_the_proof(wrong, monkeypatch):
    """Launches are compared with the bridge, bit for bit."""
    probes = [(half, [torch.arange(256.0).half()], {}), (half, [torch.ones(256).half()], {})]
    monkeypatch.setattr(direct, "_probes", lambda device: probes)
    monkeypatch.setattr(bridge, "jax_device", lambda device: jax.devices("cpu")[0])
    monkeypatch.setattr(bridge, "call", lambda function, tensors: [tensors[0].clone() for _ in range(2)])

    class Mocked:
        def __init__(self, program, device):
            assert isinstance(program, programs.Program)

        def __call__(self, tensors):
            found = [tensors[0].clone() for _ in range(2)]
            if wrong == "bit" and tensors[0][0] == 1:
                found[1].view(torch.int16)[255] += 1
            if wrong == "error":
                raise AttributeError("no such name")
            return found

    monkeypatch.setattr(direct, "Launch", Mocked)
    if wrong:
        said = {"bit": "not the bridge's", "error": "AttributeError: no such name"}[wrong]
        with pytest.warns(UserWarning, match=said):
            assert not direct.works.__wrapped__(CPU)
    else:
        assert direct.works.__wrapped__(CPU)


def test_signatures():
    """A launch serves no other shapes, dtypes, devices or options, and no absent operand."""
    q, k, v = qkv(0, torch.float16, grad=False)
    x, o = Operands(q, k, v), Options()
    base = direct.signature("forward", x, o)
    others = [
        direct.signature("backward", x, o),
        direct.signature("forward", x._replace(q=q[:, :-1]), o),
        direct.signature("forward", x._replace(v=v.float()), o),
        direct.signature("forward", x._replace(k=k.to("meta")), o),
        direct.signature("forward", x._replace(sinks=torch.ones(1, 4)), o),
        direct.signature("forward", x, o._replace(right=0)),
        direct.signature("forward", x, o, True),
    ]
    assert direct.signature("forward", Operands(q + 1, k, v), Options()) == base
    assert len({base, *others}) == 1 + len(others)


# --- repeated calls, which skip checks, the dispatcher and most of autograd


@pytest.fixture
def launched(monkeypatch, played):
    """q, k, v whose causal calls have been launched before, and a list that counts their launches."""
    (q, k, v), player = prepared("D64_short")
    program = lower(kernels.forward, [*structs(q.shape, k.shape, v.shape), *[None] * 8], options=Options(right=0))
    count = []
    played(lambda *addresses: (count.append(1), player.forward(*addresses)))
    launch = direct.Launch(program, CPU)
    monkeypatch.setattr(direct, "launches", {})
    direct.launches[direct.signature("forward", (q, k, v), Options(right=0))] = launch
    return (q, k, v), count


def test_repeated_calls(launched):
    tensors, count = launched
    expected = by_definition(*(x.double() for x in tensors), right=0)
    out, lse, _ = flash_attn_func(*tensors, causal=True, return_attn_probs=True)
    torch.testing.assert_close(out.double(), expected[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(flash_attn_func(*tensors, causal=True), out), "without lse"
    assert len(count) == 2
    flash_attn_func(*tensors, causal=True, deterministic=True)
    flash_attn_func(*tensors)
    assert len(count) == 2, "another call"


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False)])
def test_repeated_calls_have_gradients(launched, wanted):
    tensors, count = launched
    ours = [x.clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
    out, lse, _ = flash_attn_func(*ours, causal=True, return_attn_probs=True)
    assert len(count) == 1
    weights = cotangent(out, 3), cotangent(lse, 4)
    leaves = [x for x in ours if x.requires_grad]
    found = torch.autograd.grad([out, lse], leaves, weights)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in ours]
    outputs = by_definition(*wide, right=0)
    expected = torch.autograd.grad(outputs, [x for x in wide if x.requires_grad], [w.double() for w in weights])
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, atol=2e-2, rtol=2e-2)


def test_the_first_result_alone(played):
    """What only the others need is left out."""
    program = programs.lower(lambda x: [identity(x)[1:], identity(x)], structs((256,)))
    ran = []
    played(*(functools.partial(lambda n, i, o: (ran.append(n), plays_copy(256)(i, o)), n) for n in range(2)))
    x, launch = torch.randn(256).half(), direct.Launch(program, CPU)
    assert torch.equal(launch.first([x]), x[1:])
    assert ran == [0]
    assert all(map(torch.equal, launch([x]), (x[1:], x)))


def alone(played, count: list) -> tuple:
    """q, k, v whose program starts with its kernel, that program, and a launch of it, which counts."""
    (q, k, v), player = prepared("D64")
    program = lower(kernels.forward, [*structs(q.shape, k.shape, v.shape), *[None] * 8], options=Options(right=0))
    played(lambda *addresses: (count.append(1), player.forward(*addresses)))
    return (q, k, v), program, direct.Launch(program, CPU)


def test_results_that_nobody_reads(played, monkeypatch):
    """They go where those of all calls go; tensors that a kernel cannot read are copied first, as ever."""
    monkeypatch.setattr(direct, "_ALIGNMENT", 64)  # as a CPU's memory is
    count, room = [], direct._unread(CPU)
    (q, k, v), _, launch = alone(played, count)
    out = launch((q, k, v))[0]
    room.zero_()
    assert torch.equal(launch.first((q, k, v)), out)
    assert room.any(), "lse"
    elsewhere = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in (q, k, v)]
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    room.zero_()
    assert torch.equal(launch.first(elsewhere), out)
    assert torch.equal(launch.first((turned, k, v)), out)
    assert not room.any()
    assert len(count) == 4


def test_results_that_take_much_room(played, monkeypatch):
    _, program, launch = alone(played, [])
    assert launch.alone is not None
    for room, fits in ((2 * 384 * 4, True), (2 * 384 * 4 - 1, False)):
        monkeypatch.setattr(direct, "_UNREAD_BYTES", room)
        assert (direct._alone(program, (0, print), launch.constants, CPU) is not None) == fits


def test_repeated_gradients(played, monkeypatch):
    """A backward that has been launched before is launched by autograd itself."""
    tensors, player = prepared("D64_short")
    options = Options(right=0)
    shapes = structs(*(t.shape for t in tensors))
    row, lse = shapes[0], jax.ShapeDtypeStruct((1, 2, 40), jnp.float32)
    forward = lower(kernels.forward, [*shapes, *[None] * 8], options=options)
    arguments = [row, None, row, lse, *shapes, *[None] * 8]
    backward = lower(kernels.backward, arguments, options=options, bias_gradient=False)
    played(player.forward, player.delta, player.backward, player.dq)
    rows = [tensors[0], None, tensors[0], torch.zeros(1, 2, 40)]
    monkeypatch.setattr(direct, "launches", {
        direct.signature("forward", tensors, options): direct.Launch(forward, CPU),
        direct.signature("backward", (*rows, *tensors), options, False): direct.Launch(backward, CPU),
    })  # fmt: skip
    leaves = [t.clone().requires_grad_() for t in tensors]
    d_out = cotangent(tensors[0], 5)
    wide = [t.double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(by_definition(*wide, right=0)[0], wide, d_out.double())
    both = torch.stack([d_out, -d_out])
    batched = torch.autograd.grad(flash_attn_func(*leaves, causal=True), leaves, both, is_grads_batched=True)
    monkeypatch.setattr("interop.attention._derivative", None)
    found = torch.autograd.grad(flash_attn_func(*leaves, causal=True), leaves, d_out)
    for ours, pair, theirs in zip(found, batched, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-2, rtol=2e-2)
        assert torch.equal(pair, torch.stack([ours, -ours]))


class Marked(torch.Tensor):
    """A tensor whose type its results have."""


def test_who_looks_sees_the_operator(launched):
    tensors, count = launched
    with Recorded() as seen:
        flash_attn_func(*tensors, causal=True)
    with torch.profiler.profile() as profile:
        flash_attn_func(*tensors, causal=True)
    assert (len(seen.calls), len(count)) == (1, 2)
    assert "jflash::attention_forward" in {event.key for event in profile.key_averages()}
    compiled = torch.compile(lambda q, k, v: flash_attn_func(q, k, v, causal=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), flash_attn_func(*tensors, causal=True))
    mapped = torch.vmap(lambda q, k, v: flash_attn_func(q, k, v, causal=True))(*(x[None] for x in tensors))
    torch.testing.assert_close(mapped[0], flash_attn_func(*tensors, causal=True), atol=1e-2, rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attn_func(*tensors, causal=True).dtype == torch.bfloat16
    graph = make_fx(lambda q, k, v: flash_attn_func(q, k, v, causal=True))(*tensors)
    assert "jflash.attention_forward" in graph.code
    before = len(count)
    with FakeTensorMode() as mode:
        assert isinstance(flash_attn_func(*map(mode.from_tensor, tensors), causal=True), FakeTensor)
    assert flash_attn_func(*(x.to("meta") for x in tensors), causal=True).is_meta
    assert len(count) == before
    with torch.inference_mode():
        assert flash_attn_func(*tensors, causal=True).is_inference()
    marked = [x.as_subclass(Marked) for x in tensors]
    assert isinstance(flash_attn_func(*marked, causal=True), Marked)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        flash_attn_func(torch.autograd.forward_ad.make_dual(*tensors[:1] * 2), *tensors[1:], causal=True)

"""Mosaic GPU kernels launched by torch: on its current stream, into its own memory, with XLA nowhere in the call.

`interop.bridge` hands a call to XLA, which costs hundreds of microseconds of host time, runs on streams of its
own and returns memory of its own. What `interop.programs` can read of a call is launched here instead: cheap to
call, and fit for CUDA graphs. The bits are the same, for the kernels are.

JAX keeps the entry points for itself. So they are used only in versions of JAX that are known, on a device where
they have first given the bridge's bits; the bridge takes whatever is not launched here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import operator
import struct
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interop import bridge
from interop.operands import Operands, Options

if TYPE_CHECKING:
    from interop.programs import Program, Step

# Of JAX, whose entry points a GPU has shown to be as below. Others call the same names otherwise (0.12 passes a launch
# two more arguments, 0.10 packs them), and a wrong call ends the process where a probe could not catch it.
VERSIONS = ((0, 11, 2),)
_DTYPES = {torch.float16, torch.bfloat16}  # of the kernels
_ALIGNMENT = 256  # which they assume of every address
_UNREAD_BYTES = 2**20
Tensors = Sequence[Tensor | None]
Loaded = tuple[int, Callable]  # a kernel, and what launches it

launches: dict[Hashable, Launch | None] = {}  # None: the bridge takes such calls


def signature(name: str, tensors: Tensors, *static: Hashable) -> Hashable:
    """What all calls have in common that one launch serves."""
    if len(tensors) == 3:  # just q, k and v: a flat key is found in half the time
        q, k, v = tensors
        return name, static, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device
    return name, static, tuple([None if t is None else (t.shape, t.dtype, t.device) for t in tensors])


def again(key: Hashable, tensors: Tensors) -> Sequence[Tensor] | None:
    """The results of a call, if one of its signature has been launched before."""
    launch = launches.get(key)
    return None if launch is None else launch(tensors)


def call(key: Hashable, function: Callable, tensors: Tensors, **static) -> Sequence[Tensor]:
    """`bridge.call`, launched by torch where that is possible; `key` is the call's signature."""
    device = bridge.common_device(tensors)
    if key not in launches and not bridge.is_capturing(device):
        launches[key] = _prepare(function, tensors, static, device)
    found = again(key, tensors)
    return bridge.call(function, tensors, **static) if found is None else found


def _prepare(function: Callable, tensors: Tensors, static: dict, device: torch.device) -> Launch | None:
    """A launch for calls like this one, or None if they are the bridge's."""
    if device.type != "cuda" or _DTYPES.isdisjoint(t.dtype for t in tensors if t is not None):
        return None
    with _thread.on(device):  # and then on the device of before: JAX leaves that current which it has worked on
        if bridge.load_jax().__version_info__ not in VERSIONS:
            return None
        target = bridge.jax_device(device)  # raises here if JAX has no such device
        try:
            program = _lower(function, tensors, static, target)
            return Launch(program, device) if program is not None and works(device) else None
        except Exception as error:
            return _surprise(f"a call cannot be launched on {device}: {type(error).__name__}: {error}")


def _lower(function: Callable, tensors: Tensors, static: dict, target: Any) -> Program | None:
    """The program of function(*arrays, **static) on a JAX device, or None if it has work for XLA."""
    jax = bridge.load_jax()
    from interop import programs

    arguments = [None if t is None else jax.ShapeDtypeStruct(t.shape, str(t.dtype)[6:]) for t in tensors]
    try:
        with jax.default_device(target):
            return programs.lower(functools.partial(function, **static), arguments)
    except programs.Unsupported:
        return None


def _surprise(what: str) -> None:
    warnings.warn(f"jflash calls kernels through XLA, at a higher cost a call: {what}", stacklevel=2)


class Launch:
    """A program on a device. Calling it queues the work on torch's current stream."""

    def __init__(self, program: Program, device: torch.device):
        self.device, self.index = device, device.index
        self.constants = [bridge.canonical(x).to(device) for x in program.constants]
        loaded = [None if callable(step.run) else _compile(step.run.module) for step in program.steps]
        runners = [_runner(*each, device) for each in zip(program.steps, loaded, strict=True)]
        self.steps = [(run, _chosen(step.operands)) for run, step in zip(runners, program.steps, strict=True)]
        self.returned = _chosen(program.returned)
        self.first_returned, self.to_first = program.returned[0], self.steps[: program.to_first]
        self.alone = _alone(program, loaded[0], self.constants, device)

    def __call__(self, tensors: Tensors) -> Sequence[Tensor]:
        return self.returned(self._run(tensors, self.steps))

    def first(self, tensors: Tensors) -> Tensor:
        """The first of the results, without the steps behind it."""
        if self.alone is not None and self._is_current():
            found = self.alone(tensors)
            if found is not None:
                return found
        return self._run(tensors, self.to_first)[self.first_returned]

    def _is_current(self) -> bool:
        return self.index in _thread.devices and _current_device() == self.index

    def _run(self, tensors: Tensors, steps: list) -> list[Tensor]:
        """The values of the program in their order."""
        if not self._is_current():
            with _thread.on(self.device):
                return self._run(tensors, steps)
        values = [  # as kernels read them: row-major at an aligned address, which most are
            t if t.is_contiguous() and not t.data_ptr() % _ALIGNMENT and not t.is_neg() else bridge.canonical(t)
            for t in tensors
            if t is not None
        ]
        values += self.constants
        for run, operands in steps:
            values += run(operands(values))
        return values


def _chosen(numbers: Sequence[int]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """What takes the values of some numbers out of a list."""
    if len(numbers) == 1:
        return lambda values: (values[numbers[0]],)
    return operator.itemgetter(*numbers)


class _Thread(threading.local):
    """A launch goes to the CUDA context of the thread, which has none before torch's first work in it."""

    devices: frozenset[int | None] = frozenset()

    @contextlib.contextmanager
    def on(self, device: torch.device):
        with torch.cuda.device(device):
            if device.index not in self.devices:
                torch.zeros(1, device=device)
                self.devices |= {device.index}
            yield


_thread = _Thread()


def _runner(step: Step, loaded: Loaded | None, device: torch.device) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs a step of a program on its operands."""
    operation = step.run
    if callable(operation):
        return lambda operands: [operation(*operands)]
    assert loaded is not None
    kernel, launch = loaded
    pack = struct.Struct(f"{len(step.operands) + len(operation.outputs)}P").pack
    index, in_place, empty = device.index, operation.in_place, _allocator(device)
    outputs = [(shape, bridge.row_major(shape), dtype) for shape, dtype in operation.outputs]

    def run(operands: Sequence[Tensor]) -> list[Tensor]:
        if in_place:
            results = [operands[in_place[n]] if n in in_place else empty(*x) for n, x in enumerate(outputs)]
        else:
            results = [empty(*x) for x in outputs]
        launch(kernel, _stream(index), pack(*[x.data_ptr() for x in (*operands, *results)]))
        return results

    return run


def _alone(
    program: Program, loaded: Loaded | None, constants: list[Tensor], device: torch.device
) -> Callable[[Tensors], Tensor | None] | None:
    """What launches a program for its first result, where that is the first of a kernel and nothing comes before.

    It takes tensors of which none is None, and gives None for such as kernels do not read. Memory takes half as long
    as a launch, so the kernel's other results, which nobody reads, share theirs with all such calls.
    """
    step, first = program.steps[0], program.inputs + len(constants)
    if program.returned[0] != first or loaded is None or callable(step.run) or step.run.in_place:
        return None
    (shape, dtype), *others = step.run.outputs
    if any(math.prod(shape) * dtype.itemsize > _UNREAD_BYTES for shape, dtype in others):
        return None
    (kernel, launch), order = loaded, _chosen(step.operands)
    pack = struct.Struct(f"{len(step.operands) + 1 + len(others)}P").pack
    index, strides, empty = device.index, bridge.row_major(shape), _allocator(device)
    fixed, unread = [x.data_ptr() for x in constants], [_unread(device).data_ptr()] * len(others)

    def run(tensors: Tensors) -> Tensor | None:
        addresses = [t.data_ptr() for t in tensors]
        for t, address in zip(tensors, addresses, strict=True):
            if address % _ALIGNMENT or not t.is_contiguous() or t.is_neg():
                return None
        found = empty(shape, strides, dtype)
        addresses += fixed
        launch(kernel, _stream(index), pack(*order(addresses), found.data_ptr(), *unread))
        return found

    return run


@functools.cache
def _unread(device: torch.device) -> Tensor:
    """Room for results that nobody reads. CUDA graphs may know its address, so it stays."""
    return torch.empty(_UNREAD_BYTES, dtype=torch.uint8, device=device)


# --- what JAX and torch keep to themselves, as it is in VERSIONS


_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # 20 times as fast as torch.cuda.current_stream
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def _allocator(device: torch.device) -> Callable[..., Tensor]:
    """(shape, strides, dtype) -> memory of the current device, as torch's own compiler allocates: in half the time."""
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    found = getattr(guards, f"_empty_strided_{device.type}", None)
    return found or (lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device))


_COMPILE = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p, ctypes.c_int)
_LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


_compiling = threading.Lock()  # JAX's own compilations take turns too


@functools.cache
def _compiler() -> Callable:
    """(serialized module, its length) -> a kernel loaded into the current context and what launches it."""
    try:
        from jax_plugins import xla_cuda13 as plugin  # pyright: ignore[reportMissingImports]
    except ImportError:
        from jax_plugins import xla_cuda12 as plugin  # pyright: ignore[reportMissingImports]
    return _COMPILE(("MosaicGpuCompile", ctypes.CDLL(plugin._get_library_path())))


def _compile(module: bytes) -> Loaded:
    """A kernel of the current device, and launch(kernel, stream, addresses of operands and results)."""
    with _compiling:
        found = _compiler()(module, len(module))
    if not found:
        raise RuntimeError("JAX cannot compile a kernel for torch")
    return found[0], _LAUNCH(found[1])


# --- the proof


@functools.cache
def works(device: torch.device) -> bool:
    """Whether launches on a device give the bridge's bits. Says so if they do not."""
    for function, tensors, static in _probes(device):
        expected = bridge.call(function, tensors, **static)
        try:
            program = _lower(function, tensors, static, bridge.jax_device(device))
            assert program is not None, "it has work for XLA"
            found = Launch(program, device)(tensors)
            assert all(map(torch.equal, found, expected)), "its bits are not the bridge's"
        except Exception as error:
            _surprise(f"a {function.__name__} launched on {device} failed: {type(error).__name__}: {error}")
            return False
    return True


def _probes(device: torch.device) -> list[tuple[Callable, Tensors, dict]]:
    """Calls that need all kernels, padding, scratch, results in place; one block of keys fixes the order of sums."""
    from interop import kernels

    g = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=g, device=device)
    q, d_out, out = (random((1, 100, 4, 64), dtype=torch.bfloat16) for _ in range(3))
    k, v = (random((1, 120, 2, 64), dtype=torch.bfloat16) for _ in range(2))
    d_lse, lse = random((1, 4, 100)), random((1, 4, 100)) + 5
    x, options = Operands(q, k, v), Options(right=0)
    return [
        (kernels.forward, x, {"options": options}),
        (kernels.backward, (d_out, d_lse, out, lse, *x), {"options": options, "bias_gradient": False}),
    ]

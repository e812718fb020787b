"""Torch tensors as JAX arrays and back, over DLPack: no copy, in stream order, alive while somebody reads.

Order. Torch's work before a call is waited for by JAX, and JAX's by torch's current stream; the host waits
for neither. On CPU a call returns finished results.

Life. XLA keeps an imported tensor until it has read it. The other way, JAX reuses the memory of an array as
soon as nobody holds it, whatever torch has queued: `bury` holds it until torch's stream has passed.

Source: the DLPack protocol of the array API standard, and what XLA's PJRT does with foreign buffers.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import dlpack
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage]

# What an address must be a multiple of: Mosaic GPU assumes 256, and XLA copies on CPU what is not at 64.
_ALIGNMENT = {"cuda": 256, "cpu": 64}
_DLPACK_DEVICE_TYPE = {"cpu": 1, "cuda": 2}
_SIXTY_FOUR_BITS = {torch.float64, torch.int64, torch.uint64, torch.complex128}
MEMORY_SETTINGS = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)

Tensors = Sequence[Tensor | None]


def call(function: Callable, tensors: Tensors, **static) -> list[Tensor]:
    """The arrays that `function(*arrays, **static)` of JAX returns, as torch tensors on the inputs' device.

    None among the tensors stays None. `static` must be static for JAX too: a traced Python number would be
    copied into JAX's memory without waiting for what torch still reads there. 64-bit types are allowed where the
    first tensor is of one.
    """
    device = common_device(tensors)
    jax = load_jax()
    wide = next(t.dtype for t in tensors if t is not None) in _SIXTY_FOUR_BITS
    with _current(device), jax.enable_x64(True) if wide else contextlib.nullcontext():
        try:
            return to_torch(function(*to_jax(tensors, device), **static), device)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        _give_back(device)
        return to_torch(function(*to_jax(tensors, device), **static), device)


def _give_back(device: torch.device) -> None:
    """Frees what JAX may lack: its own arrays that torch has read by now, and what torch keeps unused."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    sweep()
    torch.cuda.empty_cache()


@functools.cache
def load_jax():
    """JAX, imported when first needed.

    By default JAX takes three quarters of a GPU at its first use, which leaves torch too little. Here it
    takes memory as it needs it, unless the user has chosen otherwise.
    """
    if not any(name in os.environ for name in MEMORY_SETTINGS):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    return jax


def to_jax(tensors: Tensors, device: torch.device) -> list:
    """JAX arrays over the memory of the tensors, defined once torch's current stream gets here."""
    jax = load_jax()
    ready = [None if t is None else canonical(t) for t in tensors]
    wide = {t.dtype for t in ready if t is not None} & _SIXTY_FOUR_BITS
    if wide and not jax.config.read("jax_enable_x64"):
        raise TypeError(f"dtype={wide.pop()} needs jax_enable_x64: JAX would silently truncate it to 32 bits")
    fast = entry_points(device)
    if fast is None:
        return [None if t is None else jax.dlpack.from_dlpack(t) for t in ready]
    stream = _stream_after_torch(device)
    return [None if t is None else _import(fast, t, device, stream) for t in ready]


def to_torch(arrays: Sequence, device: torch.device) -> list[Tensor]:
    """Torch tensors over the memory of JAX arrays; torch's current stream waits until they are computed."""
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream or 1  # DLPack calls the default stream 1
    fast = entry_points(device)
    tensors = [dlpack.from_dlpack(_export(fast, x, stream)) for x in arrays]
    if device.type == "cuda":
        sweep()
        for x, t in zip(arrays, tensors, strict=True):
            weakref.finalize(t.untyped_storage(), bury, x, device).atexit = False
    return tensors


def canonical(t: Tensor) -> Tensor:
    """t as JAX takes it without copying: a plain row-major tensor at an aligned address. Mostly t itself."""
    if isinstance(t, FakeTensor):
        raise TypeError("a FakeTensor has no memory to share with JAX: call the registered operator")
    if t.requires_grad:
        t = t.detach()
    if t.is_neg():
        t = t.resolve_neg()  # DLPack knows no lazy minus and would export the values without it
    if not t.is_contiguous():
        t = t.contiguous()
    elif t.stride() != (dense := row_major(t.shape)):
        t = t.as_strided(t.shape, dense)  # an axis of size 1 has any stride, which JAX takes for a layout
    if t.data_ptr() % _ALIGNMENT.get(t.device.type, 1):
        t = t.clone(memory_format=torch.contiguous_format)
    return t


@functools.cache
def jax_device(device: torch.device):
    """The JAX device that is a torch device."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            devices = load_jax().local_devices(backend=device.type)  # starts JAX, which leaves its last device current
    except RuntimeError as error:
        raise RuntimeError(
            f"device={device} of the tensors must be a device of JAX too, which has no {device.type} backend "
            f"here: {error}. JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}. For CUDA install "
            "jax[cuda13] or jax[cuda12] as torch's CUDA is, with a cuDNN no older than JAX was built for"
        ) from error
    for found in devices:
        if found.local_hardware_id == (device.index or 0):
            return found
    raise RuntimeError(f"device={device} of the tensors must be one of JAX's devices {devices}")


def common_device(tensors: Tensors) -> torch.device:
    """The device of all the tensors."""
    devices = [t.device for t in tensors if t is not None]
    for device in devices:
        if device != devices[0]:
            raise ValueError(f"devices {devices[0]} and {device} of the tensors must be equal")
    return devices[0]


def _current(device: torch.device):
    """Makes a CUDA device current, outside of any graph capture."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    if is_capturing(device):
        raise RuntimeError(
            "this jflash call cannot be captured in a CUDA graph: XLA launches on streams of its own. Most calls of "
            "Hopper's kernels can, if the same has run once before the capture. For any other, capture what is "
            "before and after it, or use torch.compile, which does so by itself"
        )
    return torch.cuda.device(device)


def is_capturing(device: torch.device) -> bool:
    """Whether torch records a CUDA graph on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of such a tensor."""
    strides, stride = [], 1
    for n in reversed(shape):
        strides.append(stride)
        stride *= max(n, 1)
    return tuple(reversed(strides))


# --- DLPack, over JAX's own entry points below `jax.dlpack` where they are as we know them


@functools.cache
def entry_points(device: torch.device):
    """The module with JAX's entry points, 7 times as fast as the public ones; None if not as we know it.

    JFLASH_PUBLIC_DLPACK=1 insists on the public ones.
    """
    jax_device(device)  # raises here if JAX has no such device
    if os.environ.get("JFLASH_PUBLIC_DLPACK") == "1":
        return None
    probe = torch.zeros(64, device=device)
    stream = _stream_after_torch(device)
    try:
        from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

        array = _import(_jax, probe, device, stream)
        back = dlpack.from_dlpack(_export(_jax, array, stream))
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return None
    return _jax if back.data_ptr() == array.unsafe_buffer_pointer() == probe.data_ptr() else None


def _import(fast, t: Tensor, device: torch.device, stream: int | None):
    kind = _DLPACK_DEVICE_TYPE[device.type]
    return fast.dlpack_managed_tensor_to_buffer(to_dlpack(t), jax_device(device), stream, None, kind)


def _export(fast, array, stream: int | None):
    if fast is None:
        return array.__dlpack__(stream=stream)
    return fast.buffer_to_dlpack_managed_tensor(array, stream=stream)


def _stream_after_torch(device: torch.device) -> int | None:
    """The stream on which JAX records that imports are ready, made to wait for torch: one event a call."""
    if device.type == "cpu":
        return None
    stream = jax_device(device).get_stream_for_external_ready_events()
    _external_stream(stream, device).wait_stream(torch.cuda.current_stream(device))
    return stream


@functools.cache
def _external_stream(stream: int, device: torch.device):
    return torch.cuda.ExternalStream(stream, device=device)


# --- JAX memory that torch no longer holds, but whose stream may not have finished reading

graveyard: collections.deque = collections.deque()


def bury(array, device: torch.device) -> None:
    """Runs when the torch storage over an array dies: holds the array until the work queued is done."""
    event = None
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():  # such an event would belong to the graph
            event = torch.cuda.current_stream().record_event()
    graveyard.append((array, device, event))


def sweep() -> None:
    """Lets go of the arrays whose readers have finished. Each pop is atomic, so any thread may sweep."""
    with contextlib.suppress(IndexError):
        for _ in range(len(graveyard)):
            array, device, event = graveyard.popleft()
            if event is None:
                bury(array, device)
            elif not event.query():
                graveyard.appendleft((array, device, event))
                return

"""wgmma reads shared memory until it has been waited for: that is what the race detector is told here.

The read stays open until the accumulator is read, a run_state ends, or wgmma_wait(n) retires it.
"""

from __future__ import annotations

import functools
import inspect

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from tests.kernels.interpreter import memory

_running: dict = {}  # (memory, thread) -> the clocks of its wgmmas, oldest first
Key = gpu_callbacks.HostAllocationKey.from_array if hasattr(gpu_callbacks, "HostAllocationKey") else None


def wait(self, token, n: int):
    """All but the last n wgmmas of this thread are done."""
    if not hasattr(self, "thread"):  # 0.10.2 has no clock to advance
        return token
    retire = functools.partial(_wait, n=n)
    return callback.io_callback(retire, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, thread=self.thread)


def _wait(*, token, thread, n):
    shared = gpu_callbacks._get_shared_memory()
    if shared.detect_races:
        _retire(shared, thread, n)
    return token


def _retire(shared, thread, n: int) -> None:
    running = _running.get((id(shared), thread), [])
    done = running[: len(running) - n]
    del running[: len(done)]
    with shared.lock:
        for clock in done:
            shared.clocks[thread].update(clock)


def _asynchronous(multiply):
    @gpu_callbacks.fail_on_exception
    def wgmma(*, token, thread, source_info=None, **operands):
        token = multiply(token=token, thread=thread, source_info=source_info, **operands)
        shared = gpu_callbacks._get_shared_memory()
        if not shared.detect_races:
            return token
        shared.incr_clock(thread)
        clock = shared.get_clock(thread)
        clock.inc(shared.get_next_tma_thread_id())
        for x in "ab":
            key = Key(operands[f"{x}_allocation_key_as_array"])
            if not memory.in_registers(key):
                transforms = gpu_callbacks._remove_noop_transforms(operands[f"{x}_transforms"])
                read = shared.access(key, jax.tree.map(int, transforms))
                until = clock.async_smem_clock.copy()
                gpu_callbacks.get_races().check_read(thread, until, key, read, source_info=source_info)
        _running.setdefault((id(shared), thread), []).append(clock)
        return token

    return wgmma


def _retiring(read):
    @gpu_callbacks.fail_on_exception
    def read_accumulator(*, thread, **rest):
        shared = gpu_callbacks._get_shared_memory()
        if shared.detect_races:
            _retire(shared, thread, rest.get("wait_n") or 0)
        return read(thread=thread, **rest)

    return read_accumulator


def _synchronous(*, token, device_id, grid_point_coords, thread_id, acc_dtype, source_info=None, **operands):
    """JAX 0.10.2: as there, but the operands may be transposed."""
    shared = gpu_callbacks._get_shared_memory()
    thread = shared.get_global_thread_id(int(device_id), int(thread_id))
    where = utils.GPULoggingInfo(
        device_id=int(device_id),
        thread_id=int(thread_id),
        source_info=source_info,
        grid_point_coords=tuple(map(int, grid_point_coords)),
    )

    def read(x):
        transforms = operands[f"{x}_transforms"]
        kept = [t for t in transforms if not isinstance(t, gpu_callbacks.NOOP_TRANSFORMS)]
        transposed = bool(kept) and type(kept[-1]).__name__ == "TransposeTransform"
        axes = kept.pop().permutation if transposed else None
        key = Key(operands[f"{x}_allocation_key_as_array"])
        place = utils.to_range(jax.tree.map(int, tuple(kept)))
        value, _, _ = shared.get_buffer_content(key, place, thread, logging_info=where)
        return key, place, value if axes is None else np.transpose(value, axes)

    (_, _, a), (_, _, b), (key, place, accumulated) = map(read, ("a", "b", "acc"))
    product = np.matmul(a, b, dtype=acc_dtype)
    shared.store_buffer_content(key, place, accumulated + product, thread, logging_info=where)
    return token


@functools.cache
def install() -> None:
    parameters = inspect.signature(gpu_callbacks.wgmma).parameters
    if "device_id" in parameters:
        gpu_callbacks.wgmma = _synchronous
    else:
        gpu_callbacks.wgmma = _asynchronous(gpu_callbacks.wgmma)
        gpu_callbacks.wgmma_accumulator_deref = _retiring(gpu_callbacks.wgmma_accumulator_deref)

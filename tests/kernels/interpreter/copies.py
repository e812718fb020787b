"""Copies from shared to global memory that are predicated or that reduce."""

from __future__ import annotations

import functools
import threading

import jax
import numpy as np
from jax import lax
from jax._src import callback
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret

from tests.kernels.interpreter.products import Key

_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "umin": np.minimum, "umax": np.maximum}
_one_at_a_time = threading.RLock()


def _reduce(
    *, token, src_allocation_key_as_array, src_transforms, dst_allocation_key_as_array, dst_transforms, op, **who
):
    """target = op(target, source), at once and under a lock, without a race check."""
    shared = gpu_callbacks._get_shared_memory()
    keys = Key(src_allocation_key_as_array), Key(dst_allocation_key_as_array)
    transforms = (jax.tree.map(int, gpu_callbacks._remove_noop_transforms(t)) for t in (src_transforms, dst_transforms))
    if "device_id" in who:  # 0.10.2
        thread = shared.get_global_thread_id(int(who["device_id"]), int(who["thread_id"]))
        source, target = (utils.to_range(t) for t in transforms)
        options = {}
    else:
        thread = who["thread"]
        source, target = (shared.access(k, t) for k, t in zip(keys, transforms, strict=True))
        options = {"increment_clock": False}
    with _one_at_a_time:
        x, _, _ = shared.get_buffer_content(keys[0], source, thread, **options)
        y, _, _ = shared.get_buffer_content(keys[1], target, thread, **options)
        total = _REDUCTIONS[op](np.asarray(y), np.asarray(x)).astype(y.dtype)
        shared.store_buffer_content(keys[1], target, total, thread, **options)
    return token


def _copy(original, self, eqn, token, source, target, *rest, has_user_predicate, reduction_op, **params):
    if has_user_predicate:
        *rest, predicate = rest

        def copy(token):
            options = {"has_user_predicate": False, "reduction_op": reduction_op, **params}
            return _copy(original, self, eqn, token, source, target, *rest, **options)[0]

        return lax.cond(predicate, copy, lambda token: token, token), []
    if reduction_op is None:
        options = {"has_user_predicate": False, "reduction_op": None, **params}
        return original(self, eqn, token, source, target, *rest, **options)
    trees = params["src_transforms_treedef"], params["dst_transforms_treedef"]
    of_source, of_target = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), rest)
    if hasattr(self, "thread"):
        who = {"thread": self.thread}
    else:
        who = {"device_id": self.device_info.device_id, "thread_id": self.thread_id}
    token = callback.io_callback(
        functools.partial(_reduce, op=reduction_op),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        src_allocation_key_as_array=source,
        src_transforms=of_source,
        dst_allocation_key_as_array=target,
        dst_transforms=of_target,
        **who,
    )
    return token, []


@functools.cache
def install() -> None:
    interpreter = jaxpr_interpret.JaxprInterpreter
    original = interpreter._interpret_copy_smem_to_gmem_p
    interpreter._interpret_copy_smem_to_gmem_p = functools.partialmethod(
        lambda self, *args, **params: _copy(original, self, *args, **params)
    )

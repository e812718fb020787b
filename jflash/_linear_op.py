"""The one differentiable operation behind linear attention: a custom_vjp over whichever backend was chosen.

vmap folds into the batch, but for packed calls, which run one example after another. Second derivatives raise.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jflash import _transforms, backends
from jflash._partition import over_devices, typed
from jflash._transforms import fold, fold_into_batch
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem, LinearResults


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(problem: LinearProblem, backend: str, arrays: LinearArrays) -> LinearResults:
    """out and the final state, differentiable in q, k, v, log_decay, a floating mask and the initial state."""
    chosen = backends.get(backend, backends.LINEAR)
    if chosen.backward is None:
        results: Any = chosen.forward(problem, arrays)
    else:
        results = typed(functools.partial(_attend, problem, backend), arrays, _axes(problem), _result_axes(problem))
    return LinearResults(results.out, kv=results.kv, z=results.z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(problem: LinearProblem, backend: str, arrays: LinearArrays) -> LinearResults:
    problem = dataclasses.replace(problem, decay_gradient=False, mask_gradient=False)
    return _folded(backends.get(backend, backends.LINEAR).forward, problem, _result_axes(problem))((arrays,))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which of the optional gradients somebody asked for."""

    log_decay: bool
    mask: bool


def _attend_fwd(problem: LinearProblem, backend: str, arrays: LinearArrays):
    perturbed, arrays = _transforms.perturbed(arrays), _transforms.values(arrays)
    results: Any = _attend(problem, backend, arrays)
    wanted = _Wanted(log_decay=bool(perturbed.log_decay), mask=bool(perturbed.mask))
    return results, (arrays, results.out, results.norm, wanted)


def _attend_bwd(problem: LinearProblem, backend: str, residuals, cotangents: LinearResults):
    arrays, out, norm, wanted = residuals
    d_out, _, *d_state = cotangents
    d_out = _transforms.materialize(d_out)
    nothing = all(x is None or _transforms.is_zero(x) for x in d_state)
    d_kv, d_z = (None if nothing or x is None else _transforms.materialize(x) for x in d_state)
    problem = dataclasses.replace(problem, decay_gradient=wanted.log_decay, mask_gradient=wanted.mask)
    operands = _transforms.first_order_only(backend, (arrays, out, norm, d_out, d_kv, d_z))
    axes = LinearGradients(*(getattr(_axes(problem), name) for name in LinearGradients._fields))
    grads = _folded(backends.get(backend, backends.LINEAR).backward, problem, axes)(operands)
    return (LinearArrays(**grads._asdict()),)


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def _axes(problem: LinearProblem) -> LinearArrays:
    """The axes of each array, for `over_devices`."""
    kv, z = ("BH..", "BH.") if problem.sequences is None else (".H..", ".H.")
    return LinearArrays(q="B.H.", k="B.H.", v="B.H.", log_decay="B.H", mask="BH..", kv=kv, z=z, cu_seqlens=".")


def _result_axes(problem: LinearProblem) -> LinearResults:
    axes = _axes(problem)
    return LinearResults(out="B.H.", norm="B.H", kv=axes.kv, z=axes.z)


def _of_part(problem: LinearProblem, operands, _):
    """The problem and the operands of one part."""
    return _of_shapes(problem, operands[0]), operands


def _of_shapes(problem: LinearProblem, arrays: LinearArrays) -> LinearProblem:
    """The same problem with the batch and the heads of these arrays."""
    heads = [x.shape[2] for x in arrays[:3]]
    mask_shape = None if arrays.mask is None else arrays.mask.shape
    Hq, Hk, Hv = heads
    return dataclasses.replace(problem, B=arrays.q.shape[0], H=max(heads), Hq=Hq, Hk=Hk, Hv=Hv, mask_shape=mask_shape)


def _folded(function, problem: LinearProblem, result_axes):
    """function(problem, *operands) of a tuple of operands, split over devices and under vmap."""
    arrays, results = _axes(problem), _result_axes(problem)
    axes = (arrays, results.out, results.norm, results.out, results.kv, results.z)
    call = functools.partial(_split, function, axes, result_axes)
    if problem.sequences is None:
        return fold_into_batch(call, problem, _fold_operands)
    return _one_after_another(functools.partial(call, problem))


def _split(function, axes, result_axes, problem: LinearProblem, operands):
    return over_devices(function, problem, operands, _of_part, axes[: len(operands)], result_axes)


def _one_after_another(function):
    """function(operands), with a vmap rule that maps: each packed row has cu_seqlens of its own."""

    @custom_vmap
    def call(operands):
        return function(operands)

    @call.def_vmap
    def _(n, is_mapped_by_argument, operands):
        (is_mapped,) = is_mapped_by_argument
        every = jax.tree.map(lambda x, m: x if m else jnp.broadcast_to(x, (n, *x.shape)), operands, is_mapped)
        results = jax.lax.map(_one_after_another(function), every)
        return results, jax.tree.map(lambda _: True, results)

    return call


def _fold_operands(n: int, problem: LinearProblem, operands, is_mapped):
    """The problem and the operands (LinearArrays, *[B, ...]) of n examples in one batch."""
    arrays, *rest = operands
    arrays_mapped, *rest_mapped = is_mapped
    wanted = {"log_decay": problem.decay_gradient, "mask": problem.mask_gradient}

    def fold_one(name, x, mapped):
        if x is None or (wanted.get(name) is False and not mapped and x.shape[0] == 1):
            return x  # broadcasts over every example alike
        return fold(n, problem.B, x, mapped)

    arrays = LinearArrays(*map(fold_one, LinearArrays._fields, arrays, arrays_mapped))
    rest = (None if x is None else fold(n, problem.B, x, m) for x, m in zip(rest, rest_mapped, strict=True))
    return _of_shapes(problem, arrays), (arrays, *rest)

"""The one differentiable operation behind softmax attention: a custom_vjp over whichever backend was chosen.

vmap folds into the batch, so a backend never sees an extra axis. Second derivatives raise.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jflash import backends
from pallas_kernels.problem import AttentionArrays, AttentionGradients, AttentionProblem


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(problem: AttentionProblem, backend: str, arrays: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] and lse [B, H, Sq], differentiable in q, k, v, bias and sinks."""
    if backend == "reference":
        return backends.get(backend).forward(problem, arrays)
    return _attend(problem, backend, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(problem: AttentionProblem, backend: str, arrays: AttentionArrays):
    forward = functools.partial(_forward, backend=backend)
    problem = dataclasses.replace(problem, bias_gradient=False)
    return _fold_into_batch(forward, problem)((arrays,))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which of the optional gradients somebody asked for."""

    bias: bool


def _attend_fwd(problem: AttentionProblem, backend: str, arrays: AttentionArrays):
    perturbed = jax.tree.map(lambda x: x.perturbed, arrays, is_leaf=_is_primal)
    arrays = jax.tree.map(lambda x: x.value, arrays, is_leaf=_is_primal)
    if perturbed.alibi_slopes:
        raise NotImplementedError(
            "alibi_slopes has no gradient: wrap it in jax.lax.stop_gradient, or pass the slopes as bias="
        )
    out, lse = _attend(problem, backend, arrays)
    return (out, lse), (arrays, out, lse, _Wanted(bias=bool(perturbed.bias)))


def _attend_bwd(problem: AttentionProblem, backend: str, residuals, cotangents):
    arrays, out, lse, wanted = residuals
    d_out, d_lse = (_materialize(ct) for ct in cotangents)
    problem = dataclasses.replace(problem, bias_gradient=wanted.bias)
    operands = _first_order_only(backend, (arrays, out, lse, d_out, d_lse))
    backward = functools.partial(_backward, backend=backend)
    grads = _fold_into_batch(backward, problem)(operands)
    return (AttentionArrays(q=grads.q, k=grads.k, v=grads.v, bias=grads.bias, sinks=grads.sinks),)


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_order_only(backend: str, operands):
    """The operands themselves; differentiating them raises."""
    return operands


@_first_order_only.defjvp
def _no_second_derivative(backend, primals, tangents):
    raise NotImplementedError(
        f"the {backend!r} backward has no derivative of its own: "
        "pass implementation='reference' for second derivatives and forward mode"
    )


def _forward(problem: AttentionProblem, operands, *, backend: str):
    return backends.get(backend).forward(problem, *operands)


def _backward(problem: AttentionProblem, operands, *, backend: str) -> AttentionGradients:
    return backends.get(backend).backward(problem, *operands)


def _fold_into_batch(function, problem: AttentionProblem):
    """function(problem, operands), with a vmap rule that makes the mapped axis part of the batch.

    `operands` is a tuple (AttentionArrays, ...), and everything after the first has a leading axis of B.
    """

    @custom_vmap
    def call(operands):
        return function(problem, operands)

    @call.def_vmap
    def _(n, is_mapped_by_argument, operands):
        (is_mapped,) = is_mapped_by_argument
        if n == 0:
            return _nothing(function, problem, operands, is_mapped)
        arrays = _fold_arrays(n, problem, operands[0], is_mapped[0])
        rest = (_fold(n, problem.B, x, m) for x, m in zip(operands[1:], is_mapped[1:], strict=True))
        folded = dataclasses.replace(
            problem, B=n * problem.B, bias_shape=_shape(arrays.bias), mask_shape=_shape(arrays.mask)
        )
        results = _fold_into_batch(function, folded)((arrays, *rest))
        shapes = _shapes_of_one(function, problem, operands, is_mapped)
        results = jax.tree.map(functools.partial(_unfold, n), results, shapes)
        return results, jax.tree.map(lambda _: True, results)

    return call


def _shapes_of_one(function, problem: AttentionProblem, operands, is_mapped):
    """What function returns for one example, as shapes."""
    drop = lambda x, m: jax.ShapeDtypeStruct(x.shape[1:] if m else x.shape, x.dtype)  # noqa: E731
    return jax.eval_shape(functools.partial(function, problem), jax.tree.map(drop, operands, is_mapped))


def _nothing(function, problem: AttentionProblem, operands, is_mapped):
    """The results of a vmap over no examples."""
    shapes = _shapes_of_one(function, problem, operands, is_mapped)
    empty = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), shapes)
    return empty, jax.tree.map(lambda _: True, empty)


def _fold_arrays(n: int, problem: AttentionProblem, arrays: AttentionArrays, is_mapped) -> AttentionArrays:
    """Folds each array; one that broadcasts over the batch for every example alike may stay as it is."""
    own_gradient = {"sinks", "bias"} if problem.bias_gradient else {"sinks"}
    may_stay = set(AttentionArrays._fields) - {"q", "k", "v", "dropout_seeds"} - own_gradient

    def fold(name, x, mapped):
        if x is None or (name in may_stay and not mapped and x.shape[0] == 1):
            return x
        return _fold(n, problem.B, x, mapped)

    return AttentionArrays(*map(fold, AttentionArrays._fields, arrays, is_mapped))


def _fold(n: int, batch: int, x: jax.Array, mapped: bool) -> jax.Array:
    """[n, batch or 1, ...] if mapped, else [batch or 1, ...] -> [n batch, ...]."""
    shape = x.shape[2:] if mapped else x.shape[1:]
    return jnp.broadcast_to(x, (n, batch, *shape)).reshape(n * batch, *shape)


def _unfold(n: int, x: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """[n batch, ...] -> [n, ...] with each example's own shape, summed where that broadcasts over the batch."""
    x = x.reshape(n, -1, *x.shape[1:])
    return x if x.shape[1:] == shape.shape else x.sum(axis=1, keepdims=True)


def _shape(x: jax.Array | None):
    return None if x is None else x.shape


def _is_primal(x) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _materialize(cotangent) -> jax.Array:
    """Zeros in place of a symbolic zero."""
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent

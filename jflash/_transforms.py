"""What JAX asks of an op, the same for every family: vmap, second derivatives, absent cotangents, promotion."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

_P = ParamSpec("_P")
_R = TypeVar("_R")


def by_standard_rules(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """function, which relies on JAX's promotion of dtypes and ranks, also where the user has forbidden it."""

    @functools.wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **options)

    return call


def fold_into_batch(function, problem, fold_operands):
    """function(problem, operands), with a vmap rule that makes the mapped axis part of the batch.

    `fold_operands(n, problem, operands, is_mapped)` gives the problem and the operands of n examples in one
    batch. Every result of function has a leading axis of B, or of 1 where it is summed over the batch.
    """

    @custom_vmap
    def call(operands):
        return function(problem, operands)

    @call.def_vmap
    def _(n, is_mapped_by_argument, operands):
        (is_mapped,) = is_mapped_by_argument
        if n == 0:
            return _nothing(function, problem, operands, is_mapped)
        folded, folded_operands = fold_operands(n, problem, operands, is_mapped)
        results = fold_into_batch(function, folded, fold_operands)(folded_operands)
        shapes = _shapes_of_one(function, problem, operands, is_mapped)
        results = jax.tree.map(functools.partial(_unfold, n), results, shapes)
        return results, jax.tree.map(lambda _: True, results)

    return call


def fold(n: int, batch: int, x: jax.Array, mapped: bool) -> jax.Array:
    """[n, batch or 1, ...] if mapped, else [batch or 1, ...] -> [n batch, ...]."""
    shape = x.shape[2:] if mapped else x.shape[1:]
    return jnp.broadcast_to(x, (n, batch, *shape)).reshape(n * batch, *shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def first_order_only(backend: str, operands) -> Any:
    """The operands themselves; differentiating them raises."""
    return operands


@first_order_only.defjvp
def _no_second_derivative(backend, primals, tangents):
    raise NotImplementedError(
        f"the {backend!r} backward has no derivative of its own: "
        "pass implementation='reference' for second derivatives and forward mode"
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def forward_only(name: str, operands) -> Any:
    """The operands themselves; differentiating them raises."""
    return operands


@forward_only.defjvp
def _no_derivative(name, primals, tangents):
    raise NotImplementedError(f"{name} has no gradient: a cache is for inference; train with flash_attention")


def perturbed(primals) -> Any:
    """Which leaves somebody differentiates, of a custom_vjp's arguments under symbolic_zeros."""
    return jax.tree.map(lambda x: x.perturbed, primals, is_leaf=_is_primal)


def values(primals) -> Any:
    """The arrays of a custom_vjp's arguments under symbolic_zeros."""
    return jax.tree.map(lambda x: x.value, primals, is_leaf=_is_primal)


def is_zero(cotangent) -> bool:
    """Whether a cotangent is known to be zero before it is computed."""
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def materialize(cotangent) -> jax.Array:
    """Zeros in place of a symbolic zero."""
    if is_zero(cotangent):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _shapes_of_one(function, problem, operands, is_mapped):
    """What function returns for one example, as shapes."""
    drop = lambda x, m: jax.ShapeDtypeStruct(x.shape[1:] if m else x.shape, x.dtype)  # noqa: E731
    return jax.eval_shape(functools.partial(function, problem), jax.tree.map(drop, operands, is_mapped))


def _nothing(function, problem, operands, is_mapped):
    """The results of a vmap over no examples."""
    shapes = _shapes_of_one(function, problem, operands, is_mapped)
    empty = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), shapes)
    return empty, jax.tree.map(lambda _: True, empty)


def _unfold(n: int, x: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """[n batch, ...] -> [n, ...] with each example's own shape, summed where that broadcasts over the batch."""
    x = x.reshape(n, -1, *x.shape[1:])
    return x if x.shape[1:] == shape.shape else x.sum(axis=1, keepdims=True)


def _is_primal(x) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)

"""The one differentiable operation behind softmax and L1 attention: a custom_vjp over whichever backend was chosen.

vmap folds into the batch, so a backend never sees an extra axis. Second derivatives raise.
"""

from __future__ import annotations

import dataclasses
import functools

import jax

from jflash import _transforms, backends
from jflash._partition import over_devices, typed
from jflash._transforms import fold, fold_into_batch
from pallas_kernels.parts import dropout
from pallas_kernels.problem import AttentionArrays, AttentionGradients, AttentionProblem


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(problem: AttentionProblem, backend: str, arrays: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] and lse [B, H, Sq], differentiable in q, k, v, bias and sinks."""
    if backend == "reference":
        return backends.get(backend, backends.attending(problem)).forward(problem, arrays)
    return typed(functools.partial(_attend, problem, backend), arrays, _AXES, _OUT_LSE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(problem: AttentionProblem, backend: str, arrays: AttentionArrays) -> tuple[jax.Array, jax.Array]:
    forward = functools.partial(_forward, backend=backend)
    problem = dataclasses.replace(problem, bias_gradient=False)
    return fold_into_batch(forward, problem, _fold_operands)((arrays,))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which of the optional gradients somebody asked for."""

    bias: bool


def _attend_fwd(problem: AttentionProblem, backend: str, arrays: AttentionArrays):
    perturbed, arrays = _transforms.perturbed(arrays), _transforms.values(arrays)
    if perturbed.alibi_slopes:
        raise NotImplementedError(
            "alibi_slopes has no gradient: wrap it in jax.lax.stop_gradient, or pass the slopes as bias="
        )
    out, lse = _attend(problem, backend, arrays)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse), (arrays, out, lse, _Wanted(bias=bool(perturbed.bias)))


def _attend_bwd(problem: AttentionProblem, backend: str, residuals, cotangents):
    arrays, out, lse, wanted = residuals
    problem = dataclasses.replace(
        problem, bias_gradient=wanted.bias, lse_gradient=not _transforms.is_zero(cotangents[1])
    )
    d_out, d_lse = (_transforms.materialize(ct) for ct in cotangents)
    grads = gradients(problem, backend, (arrays, out, lse, d_out, d_lse))
    return (AttentionArrays(q=grads.q, k=grads.k, v=grads.v, bias=grads.bias, sinks=grads.sinks),)


def gradients(problem: AttentionProblem, backend: str, operands) -> AttentionGradients:
    """Of (arrays, out, lse, d_out, d_lse), where out and lse may be those of more keys than arrays has."""
    operands = _transforms.first_order_only(backend, operands)
    return fold_into_batch(functools.partial(_backward, backend=backend), problem, _fold_operands)(operands)


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


# The axes of the operands of a backward, of which a forward has the first, and of the gradients.
_AXES = AttentionArrays(
    q="B.H.", k="B.H.", v="B.H.", bias="BH..", mask="BH..", q_segment_ids="B.", kv_segment_ids="B.", key_ranges="B..",
    alibi_slopes="BH.", sinks="BH", dropout_seeds="B.", row_ends="B.",
)  # fmt: skip
_OUT_LSE = ("B.H.", "BH.")
_GRADIENTS = AttentionGradients(*(getattr(_AXES, name) for name in AttentionGradients._fields))


def _forward(problem: AttentionProblem, operands, *, backend: str):
    run = backends.get(backend, backends.attending(problem)).forward
    return over_devices(run, problem, operands, _of_part, (_AXES,), _OUT_LSE)


def _backward(problem: AttentionProblem, operands, *, backend: str) -> AttentionGradients:
    run = backends.get(backend, backends.attending(problem)).backward
    return over_devices(run, problem, operands, _of_part, (_AXES, *_OUT_LSE, *_OUT_LSE), _GRADIENTS)


def _of_part(problem: AttentionProblem, operands, index):
    """The problem and the operands of one of the parts of the heads."""
    arrays, *rest = operands
    problem = _of_shapes(problem, arrays)
    if arrays.dropout_seeds is not None:
        seeds = dropout.seeds_from_head(arrays.dropout_seeds, index * problem.H)
        arrays = arrays._replace(dropout_seeds=seeds)
    return problem, (arrays, *rest)


def _of_shapes(problem: AttentionProblem, arrays: AttentionArrays) -> AttentionProblem:
    """The same problem with the batch and the heads of these arrays."""
    B, _, H, _ = arrays.q.shape
    return dataclasses.replace(
        problem, B=B, H=H, Hk=arrays.k.shape[2], bias_shape=_shape(arrays.bias), mask_shape=_shape(arrays.mask)
    )


def _fold_operands(n: int, problem: AttentionProblem, operands, is_mapped):
    """The problem and the operands (AttentionArrays, *[B, ...]) of n examples in one batch."""
    arrays = _fold_arrays(n, problem, operands[0], is_mapped[0])
    rest = (fold(n, problem.B, x, m) for x, m in zip(operands[1:], is_mapped[1:], strict=True))
    return _of_shapes(problem, arrays), (arrays, *rest)


def _fold_arrays(n: int, problem: AttentionProblem, arrays: AttentionArrays, is_mapped) -> AttentionArrays:
    """Folds each array; one that broadcasts over the batch for every example alike may stay as it is."""
    own_gradient = {"sinks", "bias"} if problem.bias_gradient else {"sinks"}
    may_stay = set(AttentionArrays._fields) - {"q", "k", "v", "dropout_seeds"} - own_gradient

    def fold_one(name, x, mapped):
        if x is None or (name in may_stay and not mapped and x.shape[0] == 1):
            return x
        return fold(n, problem.B, x, mapped)

    return AttentionArrays(*map(fold_one, AttentionArrays._fields, arrays, is_mapped))


def _shape(x: jax.Array | None):
    return None if x is None else x.shape

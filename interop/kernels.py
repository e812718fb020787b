"""The JAX side of the operators: jitted functions of arrays. Imports JAX, so imported at the first call."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from interop.ops import Operands, Options
from jflash import backends
from jflash._arguments import bind
from pallas_kernels.parts import dropout
from pallas_kernels.problem import AttentionProblem

compiled: list[AttentionProblem] = []  # one for each program that this process has compiled


def forward(*arrays, options: Options):
    """(out, lse) of the `Operands`, by the best backend of their device."""
    return _forward(*arrays, options=options, target=backends.target_of(arrays[0]))


def backward(*arrays, options: Options, bias_gradient: bool):
    """Gradients of q, k, v, of the bias if asked for, and of sinks if there are any.

    The arrays are d_out, d_lse, out, lse and the `Operands`.
    """
    target = backends.target_of(arrays[0])
    return _backward(*arrays, options=options, target=target, bias_gradient=bias_gradient)


@functools.partial(jax.jit, static_argnames=("options", "target"))
def _forward(*arrays, options: Options, target: str):
    problem, arrays = _bind(Operands(*arrays), options, target)
    return backends.get(backends.choose(problem, None)).forward(problem, arrays)


@functools.partial(jax.jit, static_argnames=("options", "target", "bias_gradient"))
def _backward(d_out, d_lse, out, lse, *arrays, options: Options, target: str, bias_gradient: bool):
    problem, arrays = _bind(Operands(*arrays), options, target)
    backend = backends.get(backends.choose(problem, None))  # the forward's, as `problem` is the forward's
    assert backend.backward is not None, backend
    problem = dataclasses.replace(problem, bias_gradient=bias_gradient)
    d_lse = jnp.zeros_like(lse) if d_lse is None else d_lse
    grads = backend.backward(problem, arrays, out, lse, d_out, d_lse)
    found = (grads.q, grads.k, grads.v, grads.bias if bias_gradient else None, grads.sinks)
    return [x for x in found if x is not None]


def _bind(x, options: Options, target: str):
    """The problem and its arrays, from `Operands` of arrays."""
    keys = None if x.dropout_seed is None else _keys(x.dropout_seed)
    segment_ids = None if x.q_segment_ids is None else (x.q_segment_ids, x.kv_segment_ids)
    problem, bound = bind(
        x.q, x.k, x.v, scale=options.scale, window=(options.left, options.right),
        softcap=options.softcap or None, bias=x.bias, mask=x.mask, sinks=_per_head(x.sinks),
        alibi_slopes=_per_head(x.alibi_slopes), segment_ids=segment_ids, dropout_rate=options.dropout_p,
        dropout_key=None if keys is None else keys[0], deterministic=options.deterministic, target=target,
    )  # fmt: skip
    compiled.append(problem)
    if keys is not None:
        # One key for every batch entry but under torch.vmap, where each example may bring its own.
        seeds = jax.vmap(lambda key: dropout.batch_seeds(key, problem.B // keys.shape[0]))(keys)
        bound = bound._replace(dropout_seeds=seeds.reshape(problem.B, 2))
    return problem, bound


def _per_head(x: jax.Array | None) -> jax.Array | None:
    """[1 or B, H] -> [H] or [B, H]."""
    return x[0] if x is not None and x.shape[0] == 1 else x


def _keys(seed: jax.Array) -> jax.Array:
    """int32 [n, 2] -> n JAX random keys."""
    return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")

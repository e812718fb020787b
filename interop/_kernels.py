"""The JAX side of the operators: jitted functions of arrays. Imports JAX, so imported at the first call."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from interop._ops import Options
from jflash import backends
from jflash._arguments import bind
from pallas_kernels.parts import dropout


def forward(*arrays, options: Options):
    """(out, lse) of q, k, v, bias, mask, alibi_slopes, dropout_seed, by the best backend of their device."""
    return _forward(*arrays, options=options, target=backends.target_of(arrays[0]))


def backward(*arrays, options: Options, bias_gradient: bool):
    """(dq, dk, dv) and, if asked for, d_bias, of d_out, d_lse, out, lse, q, k, v, bias, ..."""
    target = backends.target_of(arrays[0])
    return _backward(*arrays, options=options, target=target, bias_gradient=bias_gradient)


@functools.partial(jax.jit, static_argnames=("options", "target"))
def _forward(*arrays, options: Options, target: str):
    problem, arrays = _bind(arrays, options, target)
    return backends.get(backends.choose(problem, None)).forward(problem, arrays)


@functools.partial(jax.jit, static_argnames=("options", "target", "bias_gradient"))
def _backward(d_out, d_lse, out, lse, *arrays, options: Options, target: str, bias_gradient: bool):
    problem, arrays = _bind(arrays, options, target)
    backend = backends.get(backends.choose(problem, None))  # the forward's, as `problem` is the forward's
    assert backend.backward is not None, backend
    problem = dataclasses.replace(problem, bias_gradient=bias_gradient)
    d_lse = jnp.zeros_like(lse) if d_lse is None else d_lse
    grads = backend.backward(problem, arrays, out, lse, d_out, d_lse)
    return (grads.q, grads.k, grads.v, grads.bias) if bias_gradient else (grads.q, grads.k, grads.v)


def _bind(arrays, options: Options, target: str):
    q, k, v, bias, mask, alibi_slopes, dropout_seed = arrays
    if alibi_slopes is not None and alibi_slopes.shape[0] == 1:
        alibi_slopes = alibi_slopes[0]
    keys = None if dropout_seed is None else _keys(dropout_seed)
    problem, bound = bind(
        q, k, v, scale=options.scale, window=(options.left, options.right), softcap=options.softcap or None,
        bias=bias, mask=mask, alibi_slopes=alibi_slopes, dropout_rate=options.dropout_p,
        dropout_key=None if keys is None else keys[0], deterministic=options.deterministic, target=target,
    )  # fmt: skip
    if keys is not None:
        # One key for every batch entry but under torch.vmap, where each example may bring its own.
        seeds = jax.vmap(lambda key: dropout.batch_seeds(key, problem.B // keys.shape[0]))(keys)
        bound = bound._replace(dropout_seeds=seeds.reshape(problem.B, 2))
    return problem, bound


def _keys(seed: jax.Array) -> jax.Array:
    """int32 [n, 2] -> n JAX random keys."""
    return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")

"""The JAX side of the linear operators: jitted functions of arrays. Imports JAX, so imported at the first call."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from interop.linear_ops import Operands, Options
from jflash import LinearAttentionState, backends
from jflash._linear_arguments import bind
from pallas_kernels.problem import LinearArrays, LinearGradients, LinearProblem


def forward(*arrays, options: Options):
    """out, norm, kv and z, those that there are, of the `Operands`."""
    return _forward(*arrays, options=options, target=backends.target_of(arrays[0]))


def backward(*arrays, options: Options, wanted: tuple[bool, bool]):
    """Gradients of q, k, v and of what there is of log_decay, mask (if wanted), kv and z.

    The arrays are d_out, d_kv, d_z, out, norm and the `Operands`; `wanted` is for log_decay and mask.
    """
    return _backward(*arrays, options=options, target=backends.target_of(arrays[0]), wanted=wanted)


@functools.partial(jax.jit, static_argnames=("options", "target"))
def _forward(*arrays, options: Options, target: str):
    problem, arrays, backend = _bind(Operands(*arrays), options, target)
    problem = dataclasses.replace(problem, decay_gradient=False, mask_gradient=False)
    results = backend.forward(problem, arrays)
    results = results if options.return_state else results._replace(kv=None, z=None)
    return [x for x in results if x is not None]


@functools.partial(jax.jit, static_argnames=("options", "target", "wanted"))
def _backward(d_out, d_kv, d_z, out, norm, *arrays, options: Options, target: str, wanted: tuple[bool, bool]):
    problem, arrays, backend = _bind(Operands(*arrays), options, target)
    problem = dataclasses.replace(problem, decay_gradient=wanted[0], mask_gradient=wanted[1])
    if problem.empty:
        grads = _gradients_of_nothing(problem, arrays, d_kv, d_z)
    else:
        assert backend.backward is not None
        grads = backend.backward(problem, arrays, out, norm, d_out, d_kv, d_z)
    return [x for x in grads if x is not None]


def _gradients_of_nothing(problem: LinearProblem, arrays: LinearArrays, d_kv, d_z) -> LinearGradients:
    """Without a token a state passes through, and nothing else does anything."""
    zeros = jax.tree.map(jnp.zeros_like, arrays)
    return LinearGradients(
        q=zeros.q,
        k=zeros.k,
        v=zeros.v,
        log_decay=zeros.log_decay if problem.decay_gradient else None,
        mask=zeros.mask if problem.mask_gradient else None,
        kv=None if arrays.kv is None else d_kv,
        z=None if arrays.z is None else d_z,
    )


def _bind(x: Operands, options: Options, target: str):
    """The problem, its arrays and the backend that takes both directions."""
    state = None if x.kv is None else LinearAttentionState(x.kv, x.z)
    problem, arrays = bind(
        x.q, x.k, x.v, log_decay=x.log_decay, mask=x.mask, causal=options.causal, scale=options.scale,
        normalize=options.normalize, initial_state=state, return_state=options.return_state,
        cu_seqlens=x.cu_seqlens, reverse=options.reverse, chunk_size=options.chunk_size, target=target,
    )  # fmt: skip
    chosen = "reference" if problem.empty else backends.choose(problem, None, backends.LINEAR)
    return problem, arrays, backends.get(chosen, backends.LINEAR)

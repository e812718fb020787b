"""The JAX side of the L1 operators: jitted functions of arrays. Imports JAX, so imported at the first call."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

import jflash
from interop.l1_ops import DIFFERENTIABLE, Operands, Options
from jflash import backends
from jflash._l1_arguments import bind


def forward(*arrays, options: Options):
    """out and, for attention, lse of the `Operands`."""
    return _forward(*arrays, options=options, target=backends.target_of(arrays[0]))


def backward(*arrays, options: Options, bias_gradient: bool):
    """Gradients of what there is of q, k, v, vb, bias (if wanted) and sink.

    The arrays are d_out, d_lse, out, lse and the `Operands`.
    """
    target = backends.target_of(arrays[0])
    return _backward(*arrays, options=options, target=target, bias_gradient=bias_gradient)


@functools.partial(jax.jit, static_argnames=("options", "target"))
def _forward(*arrays, options: Options, target: str):
    x = Operands(*arrays)
    if options.function != "attention":
        return [_apply(x, options)]
    problem, bound, backend = _bind(x, options, target)
    return backend.forward(dataclasses.replace(problem, bias_gradient=False), bound)


@functools.partial(jax.jit, static_argnames=("options", "target", "bias_gradient"))
def _backward(d_out, d_lse, out, lse, *arrays, options: Options, target: str, bias_gradient: bool):
    x = Operands(*arrays)
    if options.function != "attention":
        names = [name for name in Operands._fields[:DIFFERENTIABLE] if getattr(x, name) is not None]
        some = [getattr(x, name) for name in names]
        _, pull = jax.vjp(lambda *some: _apply(x._replace(**dict(zip(names, some, strict=True))), options), *some)
        return pull(d_out)
    problem, bound, backend = _bind(x, options, target)
    problem = dataclasses.replace(problem, bias_gradient=bias_gradient)
    d_lse = jnp.zeros_like(lse) if d_lse is None else d_lse
    assert backend.backward is not None
    grads = backend.backward(problem, bound, out, lse, d_out, d_lse)
    sinks = None if x.sink is None else grads.sinks.reshape(x.sink.shape)
    return [g for g in (grads.q, grads.k, grads.v, grads.bias if bias_gradient else None, sinks) if g is not None]


def _apply(x: Operands, options: Options) -> jax.Array:
    """The functions of one output, which have derivatives of their own."""
    shared = {"scale": options.scale, "kind": options.kind, "eps": options.eps, "center": options.center}
    if options.function == "scores":
        return jflash.l1_scores(x.q, x.k, layout=options.layout, **shared)
    return jflash.l1_attention_sparse(
        x.q, x.k, x.v, x.pairs, vb=x.vb, sink=x.sink, weight=options.weight, **shared
    )  # fmt: skip


def _bind(x: Operands, options: Options, target: str):
    """The problem, its arrays and the backend that takes both directions."""
    window = None if options.left == options.right == -1 else (options.left, options.right)
    cu_seqlens = x.cu_seqlens_q if x.cu_seqlens_k is None else (x.cu_seqlens_q, x.cu_seqlens_k)
    problem, arrays = bind(
        x.q, x.k, x.v, scale=options.scale, kind=options.kind, eps=options.eps, weight=options.weight,
        sink=x.sink, window=window, mask=x.mask, bias=x.bias,
        exclude_diagonal=options.exclude_diagonal, cu_seqlens=cu_seqlens, center=options.center,
        segment_ids=None if x.q_segment_ids is None else (x.q_segment_ids, x.kv_segment_ids),
        compute=options.compute, target=target,
    )  # fmt: skip
    return problem, arrays, backends.get(backends.choose(problem, None, backends.L1), backends.L1)

"""The JAX side of the operators: jitted functions of arrays. Imports JAX, so imported at the first call."""

from __future__ import annotations

import collections
import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp

from interop.operands import Operands, Options
from jflash import backends
from jflash._arguments import bind
from jflash.kv_cache import flash_attention_with_kvcache
from pallas_kernels.parts import dropout
from pallas_kernels.problem import AttentionProblem

_FEW = 16  # queries that are not worth compiling a faster kernel for each number of keys
MANY = 16  # programs that differ in their shapes only
programs: collections.Counter = collections.Counter()  # compiled so far, by direction and all but shapes


def forward(*arrays, options: Options):
    """(out, lse) of the `Operands` by the best backend of their device."""
    return _forward(*arrays, options=options, target=backends.target_of(arrays[0]))


def backward(*arrays, options: Options, bias_gradient: bool):
    """Gradients of q, k, v, of the bias if asked for, and of sinks if there are any.

    The arrays are d_out, d_lse or None, out, lse and the `Operands`.
    """
    target = backends.target_of(arrays[0])
    return _backward(*arrays, options=options, target=target, bias_gradient=bias_gradient)


@functools.partial(jax.jit, static_argnames=("options", "target"))
def _forward(*arrays, options: Options, target: str):
    problem, arrays = _bind(arrays, options, target)
    _note("forward", problem)
    return backends.get(backends.choose(problem, None)).forward(problem, arrays)


@functools.partial(jax.jit, static_argnames=("options", "target", "bias_gradient"))
def _backward(d_out, d_lse, out, lse, *arrays, options: Options, target: str, bias_gradient: bool):
    problem, arrays = _bind(arrays, options, target)
    _note("backward", problem)
    backend = backends.get(backends.choose(problem, None))  # the forward's, as `problem` is the forward's
    assert backend.backward is not None, backend
    problem = dataclasses.replace(problem, bias_gradient=bias_gradient)
    d_lse = jnp.zeros_like(lse) if d_lse is None else d_lse
    grads = backend.backward(problem, arrays, out, lse, d_out, d_lse)
    found = (grads.q, grads.k, grads.v, grads.bias if bias_gradient else None, grads.sinks)
    return [x for x in found if x is not None]


@functools.partial(jax.jit, static_argnames="options")
def with_cache(q, k_cache, v_cache, seqlens, leftpad, pages, alibi_slopes, *, options: Options):
    """(out, lse) of queries on a cache that has their keys already; `pages` are rows of the cache [B, n]."""
    out, _, _, lse = flash_attention_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=seqlens, cache_leftpad=leftpad, block_table=pages, scale=options.scale,
        window=(options.left, options.right), softcap=options.softcap or None, alibi_slopes=_per_head(alibi_slopes),
        return_lse=True,
    )  # fmt: skip
    return out, lse


def _bind(arrays, options: Options, target: str):
    """The problem and its arrays, from the `Operands`."""
    x = Operands(*arrays)
    keys = None if x.dropout_seed is None else _keys(x.dropout_seed)
    segment_ids = None if x.q_segment_ids is None else (x.q_segment_ids, x.kv_segment_ids)
    problem, bound = bind(
        x.q, x.k, x.v, scale=options.scale, window=(options.left, options.right),
        softcap=options.softcap or None, bias=x.bias, mask=x.mask, sinks=_per_head(x.sinks),
        alibi_slopes=None if x.key_ranges is not None else _per_head(x.alibi_slopes),
        segment_ids=segment_ids, dropout_rate=options.dropout_p,
        dropout_key=None if keys is None else keys[0], deterministic=options.deterministic, target=target,
    )  # fmt: skip
    if x.key_ranges is not None:
        assert problem.left is problem.right is None, "key_ranges have the window in them"
        bound = bound._replace(key_ranges=x.key_ranges, alibi_slopes=x.alibi_slopes)
        problem = dataclasses.replace(problem, key_ranges=True, alibi=x.alibi_slopes is not None)
    if keys is not None:
        # One key for every batch entry but under torch.vmap, where each example may bring its own.
        seeds = jax.vmap(lambda key: dropout.batch_seeds(key, problem.B // keys.shape[0]))(keys)
        bound = bound._replace(dropout_seeds=seeds.reshape(problem.B, 2))
    return problem, bound


def takes_lengths(x: Operands, options: Options) -> bool:
    """Whether the call on tensors can have lengths known at run time only, and is none the slower for it."""
    return _takes_lengths(tuple(None if t is None else (tuple(t.shape), str(t.dtype)) for t in x), options)


@functools.cache
def _takes_lengths(shapes, options: Options) -> bool:
    structs = [None if s is None else jax.ShapeDtypeStruct(s[0], s[1].removeprefix("torch.")) for s in shapes]
    found = []
    target = backends.target_of(structs[0])
    jax.eval_shape(lambda *arrays: found.append(_bind(arrays, options, target)[0]), *structs)
    problem = found[0]
    if problem.Sq <= _FEW:
        return True
    unknown = dataclasses.replace(problem, left=None, right=None, key_ranges=True)
    return backends.choose(problem, None) == backends.choose(unknown, None)


def _note(direction: str, problem: AttentionProblem) -> None:
    """Runs once for each program that is compiled; warns when shapes alone make too many."""
    kind = (direction, dataclasses.replace(problem, B=0, Sq=0, Sk=0, bias_shape=None, mask_shape=None))
    programs[kind] += 1
    if programs[kind] == MANY:
        warnings.warn(
            f"jflash has compiled {MANY} programs for attention {direction}s that differ in their shapes only, the "
            f"last for B={problem.B}, Sq={problem.Sq}, Sk={problem.Sk}. Each takes seconds: pad batches to a few "
            "sizes, and sequences to a few lengths",
            stacklevel=2,
        )


def _per_head(x: jax.Array | None) -> jax.Array | None:
    """[1 or B, H] -> [H] or [B, H]."""
    return x[0] if x is not None and x.shape[0] == 1 else x


def _keys(seed: jax.Array) -> jax.Array:
    """int32 [n, 2] -> n JAX random keys."""
    return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")

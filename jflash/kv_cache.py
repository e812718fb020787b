"""Softmax attention on a key/value cache: append, rotate, attend. For generating token by token."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from jflash import _transforms, backends, rotary
from jflash._arguments import array, bind, flag, known
from jflash._partition import over_devices, typed
from pallas_kernels.problem import AttentionProblem, CacheArrays


def flash_attention_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    k: jax.Array | None = None,
    v: jax.Array | None = None,
    *,
    rotary_cos: jax.Array | None = None,
    rotary_sin: jax.Array | None = None,
    rotary_interleaved: bool = True,
    cache_seqlens: int | jax.Array | None = None,
    cache_batch_idx: jax.Array | None = None,
    cache_leftpad: jax.Array | None = None,
    block_table: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Writes new keys and values behind those of a cache, then `out = softmax(softcap(scale q k^T) + alibi) v` on all.

    Queries stand at the end of the keys: query i of an entry with n keys, new ones included, is at key position
    `i + n - Sq`. What lies behind the keys is never read. Jit it with the caches donated, and the new tokens are
    written in place: `jax.jit(step, donate_argnames=("k_cache", "v_cache"))`. Without a gradient.
    On a CPU, XLA widens a whole bfloat16 cache at every step: use float32 or float16 there.

    Args:
        q: [B, Sq, H, D], dtypes as for `flash_attention`.
        k_cache, v_cache: [B, Sc, Hk, D] and [B, Sc, Hk, Dv]; with cache_batch_idx [N, Sc, ...]; with block_table
            [N, page, ...], for a page of any size.
        k, v: [B, Sn, Hk, D] and [B, Sn, Hk, Dv], written at the cache's positions cache_seqlens and up.
        rotary_cos, rotary_sin: [positions, R / 2]; turns the first R features as `apply_rotary` does, of new key n
            at position cache_seqlens + n, and of query i at cache_seqlens + i if causal or windowed, else at
            cache_seqlens. Needs k and v.
        rotary_interleaved: pairs are (0, 1), (2, 3) ..., rather than (0, R/2), (1, R/2 + 1) ...
        cache_seqlens: an integer, or integers [B]: the keys in the cache before the new ones. Default: all of it.
        cache_batch_idx: integers [B], the row of the cache of each entry. Default: its own.
        cache_leftpad: integers [B]: keys before are padding and not seen.
        block_table: integers [B, n]: page j of entry b is row `block_table[b, j]`. Pages not in use are not read.
        scale, causal, window, softcap, alibi_slopes, sinks: as for `flash_attention`.
        num_splits: how many parts a GPU kernel may split the keys in; 0 leaves it to the kernel. A hint.
        return_lse: also return lse.
        implementation: None, or "hopper", "xla" or "reference".

    Returns:
        (out [B, Sq, H, Dv], k_cache, v_cache), and with return_lse lse [B, H, Sq] in float32 or wider.

    Raises:
        ValueError, TypeError: an argument breaks a rule above, the cache is too short for the new keys, or a row,
            page or rotary position is out of range; the caches are as they were. Under jit values cannot raise:
            there an entry that breaks a rule writes nothing, and its out is NaN.
        NotImplementedError: differentiated.

    Source: the interface of flash_attn 2's `flash_attn_with_kvcache`.
    """
    _check_hint(num_splits)
    q, k_cache, v_cache = array("q", q), array("k_cache", k_cache), array("v_cache", v_cache)
    pages = _pages(q, k_cache, v_cache, cache_batch_idx, block_table)
    fits = k_cache.shape[1] * (1 if pages is None else pages.shape[1])
    k, v = _new(q, k_cache, v_cache, k, v)
    like = [jax.ShapeDtypeStruct((q.shape[0], fits, *x.shape[2:]), x.dtype) for x in (k_cache, v_cache)]
    problem, bound = bind(
        q, *like, scale=scale, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks
    )
    start = _lengths("cache_seqlens", fits if cache_seqlens is None else cache_seqlens, problem.B)
    leftpad = None if cache_leftpad is None else _lengths("cache_leftpad", cache_leftpad, problem.B)
    if k is not None and cache_seqlens is None:
        raise ValueError("k and v need cache_seqlens, the position to write them at")
    operands = _Operands(
        q, k_cache, v_cache, k, v, _tables(problem, k, rotary_cos, rotary_sin), start, leftpad, pages,
        bound.alibi_slopes, bound.sinks,
    )  # fmt: skip
    problem = dataclasses.replace(problem, page=_page(k_cache, pages))
    rotation = _Rotation(rotary_interleaved, one_position=not causal and not any(_finite(window)))
    _check_values(problem, rotation, operands)
    chosen = backends.choose(problem, implementation, backends.CACHE)
    out, lse, k_cache, v_cache = _run(problem, "reference" if problem.empty else chosen, rotation, operands)
    return (out, k_cache, v_cache, lse) if flag("return_lse", return_lse) else (out, k_cache, v_cache)


class _Operands(NamedTuple):
    q: jax.Array
    k_cache: jax.Array
    v_cache: jax.Array
    k: jax.Array | None
    v: jax.Array | None
    tables: tuple[jax.Array, jax.Array] | None
    start: jax.Array  # [B]
    leftpad: jax.Array | None  # [B]
    pages: jax.Array | None  # [B, n]
    alibi_slopes: jax.Array | None
    sinks: jax.Array | None

    @property
    def new(self) -> int:
        """How many keys each entry gets."""
        return 0 if self.k is None else self.k.shape[1]


@dataclasses.dataclass(frozen=True)
class _Rotation:
    interleaved: bool
    one_position: bool  # all queries of an entry turn as the first

    def positions(self, problem: AttentionProblem, x: _Operands) -> int:
        """How many positions from cache_seqlens on are looked up in the tables."""
        return max(x.new, 1 if self.one_position else problem.Sq)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(problem: AttentionProblem, backend: str, rotation: _Rotation, operands: _Operands):
    """out, lse and the caches."""
    operands = _Operands(*_transforms.forward_only("flash_attention_with_kvcache", tuple(operands)))
    step = functools.partial(_step, backend, rotation)
    B = "B" if operands.pages is None else "."  # a page may be anybody's
    axes = _Operands(
        q=f"{B}.H.", k_cache=f"{B}.H.", v_cache=f"{B}.H.", k=f"{B}.H.", v=f"{B}.H.", tables=("..", ".."),
        start=B, leftpad=B, pages="..", alibi_slopes=f"{B}H", sinks=f"{B}H",
    )  # fmt: skip
    results = axes.q, f"{B}H.", axes.k_cache, axes.v_cache

    @custom_vmap
    def split(operands):
        return over_devices(step, problem, (operands,), _of_part, (axes,), results)

    @split.def_vmap
    def _(n, is_mapped, operands):
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, is_mapped)
        return jax.vmap(functools.partial(step, problem), tuple(axes), axis_size=n)(operands), (True,) * len(results)

    return typed(split, operands, axes, results)


def _of_part(problem: AttentionProblem, operands, _):
    """The problem and the operands of one part of the batch and of the heads."""
    (B, _, H, _), Hk = operands[0].q.shape, operands[0].k_cache.shape[2]
    return dataclasses.replace(problem, B=B, H=H, Hk=Hk), operands


@_transforms.by_standard_rules
def _step(backend: str, rotation: _Rotation, problem: AttentionProblem, x: _Operands):
    ok = _usable(problem, rotation, x)
    if x.tables is not None:
        x = _rotated(problem, rotation, x)
    k_cache, v_cache = x.k_cache, x.v_cache
    if x.k is not None:
        rows, slots = _places(x, ok)
        k_cache = k_cache.at[rows, slots].set(x.k, mode="drop")
        v_cache = v_cache.at[rows, slots].set(x.v, mode="drop")
    arrays = CacheArrays(x.q, k_cache, v_cache, x.start + x.new, x.leftpad, x.pages, x.alibi_slopes, x.sinks)
    attend = lambda problem, operands: backends.get(backend, backends.CACHE).forward(problem, *operands)  # noqa: E731
    out, lse = _transforms.fold_into_batch(attend, problem, _fold_operands)((arrays,))
    out, lse = jnp.where(ok[:, None, None, None], out, jnp.nan), jnp.where(ok[:, None, None], lse, jnp.nan)
    return out, lse, k_cache, v_cache


def _fold_operands(n: int, problem: AttentionProblem, operands, is_mapped):
    """The problem and the arrays of n examples in one batch; pages of caches of their own come one after another."""
    (arrays,), (mapped,) = operands, is_mapped
    N = arrays.k.shape[1 if mapped.k else 0]
    shared = arrays.pages is not None and not (mapped.k or mapped.v)

    def fold_one(name, x, is_mapped):
        of_cache = name in ("k", "v")
        if x is None or (of_cache and shared):
            return x
        return _transforms.fold(n, N if of_cache else problem.B, x, is_mapped)

    folded = CacheArrays(*map(fold_one, CacheArrays._fields, arrays, mapped))
    if folded.pages is not None and not shared:
        first = jnp.repeat(N * jnp.arange(n, dtype=jnp.int32), problem.B)
        folded = folded._replace(pages=folded.pages + first[:, None])
    return dataclasses.replace(problem, B=n * problem.B), (folded,)


def _rotated(problem: AttentionProblem, rotation: _Rotation, x: _Operands) -> _Operands:
    """The operands with q and k turned."""
    at = x.start[:, None] + jnp.arange(rotation.positions(problem, x), dtype=jnp.int32)
    q_at = jnp.repeat(at[:, :1], problem.Sq, axis=1) if rotation.one_position else at[:, : problem.Sq]
    assert x.tables is not None
    cos, sin = x.tables
    q = rotary.rotate(x.q, cos, sin, q_at, rotation.interleaved)
    return x._replace(q=q, k=rotary.rotate(x.k, cos, sin, at[:, : x.new], rotation.interleaved))


def _places(x: _Operands, ok: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The row and the slot [B, new] of each new token; for entries that are not ok, a row that no cache has."""
    N, page = x.k_cache.shape[:2]
    at = x.start[:, None] + jnp.arange(x.new, dtype=jnp.int32)
    if x.pages is None:
        rows = jnp.arange(x.start.shape[0], dtype=jnp.int32)[:, None]
    else:
        rows = jnp.take_along_axis(x.pages, at // page, axis=1, mode="clip")
    return jnp.where(ok[:, None], rows, N), at % page


def _usable(problem: AttentionProblem, rotation: _Rotation, x: _Operands) -> jax.Array:
    """Which entries [B] have room for their keys, pages that exist, and positions that the tables have."""
    ok = (x.start >= 0) & (x.start <= problem.Sk - x.new)  # a sum might overflow
    if x.tables is not None:
        ok &= x.start <= x.tables[0].shape[0] - rotation.positions(problem, x)
    if x.pages is None:
        return ok
    N, page = x.k_cache.shape[:2]
    exists = (x.pages >= 0) & (x.pages < N)
    unused = jnp.arange(x.pages.shape[1]) * page >= (x.start + x.new)[:, None]
    return ok & (exists | unused).all(axis=1)


# --- what users may pass


def _pages(q, k_cache, v_cache, cache_batch_idx, block_table) -> jax.Array | None:
    """Rows of the cache for each entry, [B, n], or None where entry b has row b."""
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.ndim != 4:
            raise ValueError(f"{name}.shape={x.shape} must have 4 axes: [batch or pages, seq, heads, dim]")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"k_cache.shape={k_cache.shape} and v_cache.shape={v_cache.shape} must agree but in the last axis"
        )
    B = q.shape[0]
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("block_table and cache_batch_idx must not both be given: a table names the rows itself")
        block_table = _integers("block_table", block_table)
        if block_table.ndim != 2 or block_table.shape[0] != B:
            raise ValueError(f"block_table.shape={block_table.shape} must be [B, pages] with B={B}")
        return block_table
    if cache_batch_idx is not None:
        cache_batch_idx = _integers("cache_batch_idx", cache_batch_idx)
        if cache_batch_idx.shape != (B,):
            raise ValueError(f"cache_batch_idx.shape={cache_batch_idx.shape} must be [B]={[B]}")
        return cache_batch_idx[:, None]
    if k_cache.shape[0] != B:
        raise ValueError(
            f"batch sizes of q and k_cache, {B} and {k_cache.shape[0]}, must be equal without cache_batch_idx"
        )
    return None


def _page(k_cache, pages) -> int | None:
    """Keys in a page, if an entry has several."""
    return None if pages is None or pages.shape[1] == 1 else k_cache.shape[1]


def _new(q, k_cache, v_cache, k, v):
    """The new keys and values, checked against the caches; or None, None."""
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if k is None:
        return None, None
    k, v = array("k", k), array("v", v)
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (q.shape[0], *cache.shape[2:]):
            expected = ["B", "Sn", *cache.shape[2:]]
            raise ValueError(f"{name}.shape={x.shape} must be [{', '.join(map(str, expected))}] with B={q.shape[0]}")
        if x.dtype != cache.dtype:
            raise TypeError(f"{name}.dtype={x.dtype.name} must be the cache's {cache.dtype.name}")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k.shape={k.shape} and v.shape={v.shape} must agree in seq")
    return k, v


def _lengths(name: str, x, B: int) -> Any:
    """An integer or integers [B] -> int32 [B]."""
    if isinstance(x, numbers.Integral) and not isinstance(x, bool):
        x = np.asarray(x, np.int32)
    x = _integers(name, x)
    if x.shape not in ((), (B,)):
        raise ValueError(f"{name}.shape={x.shape} must be () or [B]={[B]}")
    return jnp.broadcast_to(x, (B,)) if isinstance(x, Tracer) else np.broadcast_to(x, (B,))


def _integers(name: str, x) -> Any:
    x = known(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name}.dtype={x.dtype.name} must be an integer type")
    return x.astype(jnp.int32)


def _tables(problem: AttentionProblem, k, cos, sin):
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if cos is None:
        return None
    if k is None:
        raise ValueError("rotary_cos and rotary_sin need k and v: the keys in the cache have been turned already")
    cos, sin = array("rotary_cos", cos), array("rotary_sin", sin)
    rotary.check_tables(problem.D, cos, sin)
    return cos, sin


def _check_values(problem: AttentionProblem, rotation: _Rotation, x: _Operands) -> None:
    """Raises where known values say that `_usable` would refuse, or that two entries would write to one row."""
    if isinstance(x.start, Tracer) or not x.start.size:
        return
    start, (N, page) = x.start, x.k_cache.shape[:2]
    if start.min() < 0 or start.max() > problem.Sk - x.new:
        what = f"cache_seqlens={start.tolist()} and {x.new} new keys"
        raise ValueError(f"{what} must be >= 0, and in sum <= {problem.Sk}, the room in the cache")
    if x.tables is not None:
        needed, shape = start.max() + rotation.positions(problem, x), x.tables[0].shape
        if needed > shape[0]:
            raise ValueError(f"rotary_cos.shape={shape} must have {needed} positions or more")
    if x.pages is None or isinstance(x.pages, Tracer):
        return
    pages, first = x.pages, page * np.arange(x.pages.shape[1])
    used = pages[first < start[:, None] + x.new]
    if used.size and not (used.min() >= 0 and used.max() < N):
        raise ValueError(f"rows {used.min()} to {used.max()} of block_table or cache_batch_idx must be in [0, {N})")
    written = pages[(first < start[:, None] + x.new) & (first + page > start[:, None])] if x.new else used[:0]
    if len(set(written.tolist())) < written.size:
        raise ValueError(f"rows {written.tolist()} of the cache, which get new keys, must be different")


def _check_hint(num_splits) -> None:
    if isinstance(num_splits, bool) or not isinstance(num_splits, numbers.Integral):
        raise TypeError(f"num_splits={num_splits!r} must be an integer")
    if num_splits < 0:
        raise ValueError(f"num_splits={num_splits} must be >= 0")


def _finite(window) -> tuple[bool, ...]:
    return () if window is None else tuple(x not in (None, -1) for x in window)

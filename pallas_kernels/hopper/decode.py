"""Decoding: out = softmax(scale q k^T) v and lse of a few queries on a cache, whose keys are read once.

The query heads of one key head, times the queries, are the rows of 64-row tiles. Memory is what limits such a
call, so a CTA is a single warpgroup that keeps `stages` blocks of keys and values on their way, and several CTAs
share an SM: what one computes runs under the copies of the others. Each takes one key head of one batch entry and
a part, a split, of the keys that the entry has at run time. `merge` adds up the splits.

A block of keys comes from the rows of the cache that a page table names; it is read a step ahead of the copies.
Values that no row sees are set to 0, since they may be NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.hopper.cache import BLOCK_KEYS
from pallas_kernels.parts import alibi, masking, ranges, scores, softmax, tma
from pallas_kernels.parts.schedule import SMS
from pallas_kernels.parts.softmax import Softmax
from pallas_kernels.problem import AttentionProblem, CacheArrays

ROWS = 64  # of a tile
WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class DecodeTile:
    stages: int  # blocks on their way
    ctas: int  # that share an SM


TILES = {64: DecodeTile(stages=5, ctas=2), 128: DecodeTile(stages=3, ctas=2)}
MOST_SPLITS, FEWEST_BLOCKS = 128, 4  # of a call, and of a split


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    problem: AttentionProblem
    tile: DecodeTile
    page: int  # keys in a row of the cache
    any_row: bool
    splits: int
    interpret: _compat.Interpret

    @property
    def rows(self) -> int:
        """Of one key head."""
        return self.problem.Sq * self.problem.group

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def pieces(self) -> int:
        """Rows of the cache that a block of keys is made of."""
        return max(1, BLOCK_KEYS // self.page)

    def tile_type(self, count: int, columns: int, dtype: Any = None, any_row: bool = True) -> tma.TileType:
        dtype = jnp.dtype(dtype or self.problem.dtype)
        return tma.TileType(count, BLOCK_KEYS, columns, dtype, any_row, self.interpret)

    @property
    def types(self) -> dict[str, tma.TileType]:
        p, stages = self.problem, self.tile.stages
        return {
            "q_smem": self.tile_type(1, p.D),
            "k_smem": self.tile_type(stages, p.D, any_row=self.any_row),
            "v_smem": self.tile_type(stages, p.Dv, any_row=self.any_row),
            "out_smem": self.tile_type(1, p.Dv, jnp.float32),
        }


class Refs(NamedTuple):
    """What a kernel sees."""

    q_gmem: Any  # [1, all rows, 1, D]
    k_gmem: Any
    v_gmem: Any
    ends_gmem: Any  # [B]: where the keys of an entry end
    out_gmem: Any  # [splits B Hk, rows, 1, Dv]
    lse_gmem: Any  # [splits B Hk, rows]
    q_smem: Any
    k_smem: Any
    v_smem: Any
    out_smem: Any
    q_full: Any
    full: Any
    starts_gmem: Any = None  # [B]: its first key
    pages_gmem: Any = None
    slopes_gmem: Any = None  # [B|1, Hk, rows] of ALiBi


class Work(NamedTuple):
    """What one CTA does."""

    b: jax.Array
    h: jax.Array  # the key head
    row: jax.Array  # the first of its 64 rows
    split: jax.Array
    block: jax.Array  # the first of its key blocks
    steps: jax.Array  # and how many
    keys: tuple[jax.Array, jax.Array]  # of the entry: the first, and the end
    seen: tuple[jax.Array, jax.Array]  # the first and the last key that some row of the entry sees
    full: tuple[jax.Array, jax.Array]  # blocks between these are seen by every row


def decode(
    p: AttentionProblem, a: CacheArrays, *, tile: DecodeTile | None = None, interpret: _compat.Interpret = None
) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] in the input dtype and lse [B, H, Sq] in float32."""
    plan = make_plan(p, a, tile or TILES[p.D], interpret)
    q = a.q.reshape(p.B, p.Sq, p.Hk, p.group, p.D).swapaxes(1, 2).reshape(1, -1, 1, p.D)
    inputs = {
        "q_gmem": q,
        "k_gmem": tma.fit(a.k, min(plan.page, BLOCK_KEYS)),
        "v_gmem": tma.fit(a.v, min(plan.page, BLOCK_KEYS)),
        "ends_gmem": a.ends,
    }
    if a.starts is not None:
        inputs["starts_gmem"] = a.starts
    if a.pages is not None:
        inputs["pages_gmem"] = a.pages
    if a.alibi_slopes is not None:
        inputs["slopes_gmem"] = _slopes_of_rows(plan, a.alibi_slopes)
    kernel = _compat.kernel(
        functools.partial(_kernel, plan, (*inputs, "out_gmem", "lse_gmem")),
        name="decode",
        out_type=(
            jax.ShapeDtypeStruct((plan.splits * p.B * p.Hk, plan.rows, 1, p.Dv), jnp.float32),
            jax.ShapeDtypeStruct((plan.splits * p.B * p.Hk, plan.row_blocks * ROWS), jnp.float32),
        ),
        scratch=_scratch(plan),
        grid=(plan.row_blocks * p.Hk * plan.splits * p.B,),
        grid_names=("cta",),
        warpgroups=1,
        interpret=interpret,
    )
    out, lse = kernel(*inputs.values())
    return merge(plan, out, lse, a.sinks)


def make_plan(p: AttentionProblem, a: CacheArrays, tile: DecodeTile, interpret: _compat.Interpret = None) -> Plan:
    page = p.page or max(a.k.shape[1], BLOCK_KEYS)
    any_row = (p.page or a.k.shape[1]) % 8 != 0
    tiles = p.B * p.Hk * -(-p.Sq * p.group // ROWS)
    return Plan(p, tile, page, any_row, split_count(tiles, -(-p.Sk // BLOCK_KEYS), SMS * tile.ctas), interpret)


def split_count(tiles: int, blocks: int, ctas: int) -> int:
    """The fewest splits of `blocks` whose CTAs, tiles for each, fill waves of `ctas` about as well as any number."""

    def filled(splits: int) -> float:
        return tiles * splits / ctas / math.ceil(tiles * splits / ctas)

    counts = range(1, max(1, min(MOST_SPLITS, blocks // FEWEST_BLOCKS)) + 1)
    best = max(map(filled, counts))
    return next(n for n in counts if filled(n) >= 0.95 * best)


def _slopes_of_rows(plan: Plan, slopes: jax.Array) -> jax.Array:
    """[B|1, H] -> [B|1, Hk, rows in whole tiles]: rows are the heads of a group, for each query in turn."""
    p = plan.problem
    each = jnp.tile(slopes.astype(jnp.float32).reshape(-1, p.Hk, p.group), (1, 1, p.Sq))
    return jnp.pad(each, ((0, 0), (0, 0), (0, -plan.rows % ROWS)))


def merge(plan: Plan, out: jax.Array, lse: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The splits added up, each weighted by exp(its lse); a sink is one more, whose out is 0.

    Without a reduction, and with lse broadcast before anything is done to it, this is one kernel of XLA's.
    """
    p = plan.problem
    lse = lse[:, : plan.rows].reshape(plan.splits, p.B, p.Hk, p.Sq, p.group)
    lse = lse.transpose(0, 1, 3, 2, 4).reshape(plan.splits, p.B, p.Sq, p.H, 1)
    out = out.reshape(plan.splits, p.B, p.Hk, p.Sq, p.group, p.Dv)
    out = out.transpose(0, 1, 3, 2, 4, 5).reshape(plan.splits, p.B, p.Sq, p.H, p.Dv)
    terms = list(jnp.broadcast_to(lse, out.shape))
    if sinks is not None:
        terms.append(jnp.broadcast_to(sinks.astype(jnp.float32)[:, None, :, None], terms[0].shape))
    top = functools.reduce(jnp.maximum, terms)
    safe = jnp.where(top == -jnp.inf, 0.0, top)
    weights = [jnp.exp(x - safe) for x in terms]
    total = functools.reduce(jnp.add, weights)
    some = total != 0  # NaN is something
    parts = functools.reduce(jnp.add, (x * weight for x, weight in zip(out, weights, strict=False)))
    merged = parts / jnp.where(some, total, 1.0)
    lse = jnp.where(some, safe + jnp.log(total), -jnp.inf)[..., 0]
    return merged.astype(p.dtype), lse.swapaxes(1, 2)


def _scratch(plan: Plan) -> dict[str, Any]:
    types, stages = plan.types, plan.tile.stages
    of_keys, of_out = types["k_smem"].refs, types["out_smem"].refs
    memory = {"q_smem": types["q_smem"].scratch, "v_smem": types["v_smem"].scratch}
    if plan.interpret is not None:
        memory |= {"k_smem": of_keys[0], "out_smem": of_out[0]}
    else:  # the output leaves through the memory of the keys
        memory["k_or_out_smem"] = plgpu.RefUnion(*of_keys, *of_out)
    copies = plan.pieces * (types["k_smem"].chunks + types["v_smem"].chunks)
    return {
        **memory,
        "q_full": plgpu.Barrier(num_arrivals=types["q_smem"].chunks),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    }


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    types = plan.types
    if plan.interpret is None:
        both, n = scratch.pop("k_or_out_smem"), len(types["k_smem"].refs)
        scratch |= {"k_smem": both[:n] if n > 1 else both[0], "out_smem": both[n:]}
    views = {name: x.view(scratch[name]) for name, x in types.items()}
    refs = Refs(**dict(zip(names, gmem, strict=True)), **{**scratch, **views})
    work = _work(plan, refs, lax.axis_index("cta"))
    here = (work.b * plan.problem.Hk + work.h) * plan.rows + work.row
    refs.q_smem.load(refs.q_gmem, 0, here, 0, 0, refs.q_full, pl.ds(0, min(ROWS, plan.rows)))
    for n in range(plan.tile.stages):
        pl.when(n < work.steps)(functools.partial(_load, plan, refs, work, n, _cache_rows(plan, refs, work, n)))
    rows = _rows(plan, refs, work)
    plgpu.barrier_wait(refs.q_full)
    acc = plgpu.layout_cast(jnp.zeros((ROWS, plan.problem.Dv), jnp.float32), WGMMA)
    carry = Carry(acc, softmax.start(ROWS), _cache_rows(plan, refs, work, plan.tile.stages))
    carry = lax.fori_loop(0, work.steps, functools.partial(_step, plan, refs, work, rows), carry)
    _epilogue(plan, refs, work, carry)


def _work(plan: Plan, refs: Refs, cta) -> Work:
    """CTAs side by side read side by side: row blocks, then heads, then splits, then batch entries."""
    p = plan.problem
    cta, row_block = lax.div(cta, plan.row_blocks), lax.rem(cta, plan.row_blocks)
    cta, h = lax.div(cta, p.Hk), lax.rem(cta, p.Hk)
    b, split = lax.div(cta, plan.splits), lax.rem(cta, plan.splits)
    start = jnp.int32(0) if refs.starts_gmem is None else refs.starts_gmem[b]
    end = jnp.minimum(refs.ends_gmem[b], p.Sk)  # of an entry that breaks a rule it may be any
    # Limits rise from query to query, so the first and the last one have the extremes.
    extremes = (ranges.in_window(p, end + n, start, end) for n in (-p.Sq, -1))
    (first, last_first), (first_last, last) = zip(*extremes, strict=True)
    keys = ranges.between(first, last_first, first_last, last, BLOCK_KEYS, -(-p.Sk // BLOCK_KEYS))
    most = lax.div(keys.hi - keys.lo + plan.splits - 1, jnp.int32(plan.splits))
    block = keys.lo + split * most
    steps = jnp.clip(keys.hi - block, 0, most)
    full = keys.full_lo, keys.full_hi
    return Work(b, h, row_block * ROWS, split, block, steps, (start, end), (first, last), full)


class Rows(NamedTuple):
    """What distinguishes the 64 rows of a tile, each [64]."""

    first: jax.Array  # key that it sees
    last: jax.Array
    position: jax.Array
    slope: Any  # of ALiBi


def _rows(plan: Plan, refs: Refs, work: Work) -> Rows:
    p = plan.problem
    start, end = (softmax.row_values(x, ROWS, jnp.int32) for x in work.keys)
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=softmax.ROWS) + work.row
    position = end - p.Sq + lax.div(row, jnp.int32(p.group))
    slope = None
    if refs.slopes_gmem is not None:
        slopes = refs.slopes_gmem.at[tma.batch_entry(refs.slopes_gmem, work.b), work.h, pl.ds(work.row, ROWS)]
        slope = _compat.load(slopes, softmax.ROWS, optimized=False)
    first, last = ranges.in_window(p, position, start, end)
    return Rows(first, last, position, slope)


def _cache_rows(plan: Plan, refs: Refs, work: Work, step) -> tuple:
    """The rows of the cache that hold the key block of a step."""
    if refs.pages_gmem is None:
        return (work.b,)
    last = refs.pages_gmem.shape[1] - 1
    first = lax.div((work.block + step) * BLOCK_KEYS, jnp.int32(plan.page))
    pages = (refs.pages_gmem[work.b, jnp.minimum(first + n, last)] for n in range(plan.pieces))
    return tuple(jnp.clip(page, 0, refs.k_gmem.shape[0] - 1) for page in pages)  # an unused page may be any


def _load(plan: Plan, refs: Refs, work: Work, step, cache_rows: tuple) -> None:
    """Starts to copy the keys and the values of a step."""
    slot = lax.rem(jnp.int32(step), jnp.int32(plan.tile.stages))
    start = lax.rem((work.block + step) * BLOCK_KEYS, jnp.int32(plan.page))
    size = BLOCK_KEYS // plan.pieces
    for smem, gmem in ((refs.k_smem, refs.k_gmem), (refs.v_smem, refs.v_gmem)):
        for n, row in enumerate(cache_rows):
            smem.load(gmem, row, start, work.h, slot, refs.full.at[slot], pl.ds(n * size, size))


class Carry(NamedTuple):
    acc: jax.Array  # [64, Dv]
    state: Softmax
    cache_rows: tuple  # of the next block to copy


def _step(plan: Plan, refs: Refs, work: Work, rows: Rows, step, carry: Carry) -> Carry:
    """Takes one block of keys in, then fills its slot again."""
    p, stages = plan.problem, plan.tile.stages
    slot, start = lax.rem(step, stages), (work.block + step) * BLOCK_KEYS
    plgpu.barrier_wait(refs.full.at[slot])

    def products(s_acc):
        for c in range(refs.q_smem.type.chunks):
            keys = refs.k_smem.columns(slot, c * tma.CHUNK, tma.CHUNK)
            plgpu.wgmma(s_acc, refs.q_smem.multiplied.at[0, c], keys.transpose((1, 0)))
        return s_acc[...]

    s = pl.run_scoped(products, plgpu.ACC((ROWS, BLOCK_KEYS), jnp.float32))
    far = functools.partial(_far, rows, start, s.shape, plan.interpret)
    s, factor, _ = scores.modify(p, s, far, plan.interpret)
    low, high = rows.first - start, rows.last - start
    hide = functools.partial(masking.hide_columns, low=low, high=high, interpret=plan.interpret)
    cut = (work.block + step < work.full[0]) | (work.block + step >= work.full[1])
    s = lax.cond(cut, hide, lambda s: s, s)
    state, weights, fade = softmax.step(carry.state, s, factor, guarded=True)
    first, last = (key - start for key in work.seen)
    pl.when((first > 0) | (last < BLOCK_KEYS - 1))(functools.partial(_clear, refs.v_smem, slot, first, last))

    def sums(o_acc):
        o_acc[...] = carry.acc * softmax.over_columns(fade, carry.acc.shape)
        tma.product(o_acc, weights.astype(p.dtype), refs.v_smem, slot)
        return o_acc[...]

    acc = pl.run_scoped(sums, plgpu.ACC(carry.acc.shape, jnp.float32))
    plgpu.commit_smem()  # all warps have read the slot
    pl.when(step + stages < work.steps)(functools.partial(_load, plan, refs, work, step + stages, carry.cache_rows))
    return Carry(acc, state, _cache_rows(plan, refs, work, step + stages + 1))


def _far(rows: Rows, start, shape: tuple[int, int], interpret: _compat.Interpret) -> jax.Array:
    """ALiBi of the keys from `start` on."""
    return alibi.of_rows([rows.slope, rows.position.astype(jnp.float32)], None, start, shape, interpret)


def _clear(v_smem: tma.Tiles, slot, first, last) -> None:
    """Sets values to 0 but in the rows [first, last]."""
    for c in range(v_smem.type.chunks):
        tile = v_smem.multiplied.at[slot, c]
        row = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=WGMMA)
        tile[...] = jnp.where((row >= first) & (row <= last), _compat.load(tile, WGMMA), 0)
    plgpu.commit_smem()


def _epilogue(plan: Plan, refs: Refs, work: Work, carry: Carry) -> None:
    """Divides and writes out the rows that there are."""
    inverse, lse = softmax.finish(carry.state)
    refs.out_smem.write(0, carry.acc * softmax.over_columns(inverse, carry.acc.shape))
    plgpu.commit_smem()
    index = (work.split * plan.problem.B + work.b) * plan.problem.Hk + work.h
    refs.out_smem.store(refs.out_gmem, index, work.row, 0, 0, pl.ds(0, min(ROWS, plan.rows)))
    refs.lse_gmem[index, pl.ds(work.row, ROWS)] = lse
    plgpu.wait_smem_to_gmem(0)

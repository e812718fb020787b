"""A consumer's 64 query rows against blocks of keys: what they may see, and how their scores are bent.

Features that were not asked for are None in `refs` and leave nothing in the kernel. Shared by the kernels that
keep queries still and walk over keys.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.parts import alibi, bias, dropping, masking, ranges, scores, softmax, sparsity, tma
from pallas_kernels.parts.ranges import Range
from pallas_kernels.parts.schedule import Work
from pallas_kernels.parts.scores import Scores
from pallas_kernels.parts.softmax import Softmax
from pallas_kernels.problem import AttentionArrays, AttentionProblem


def inputs(p: AttentionProblem, a: AttentionArrays, rows: int, block_kv: int) -> dict[str, jax.Array]:
    """The arrays of the features of a call, for tiles of rows x block_kv."""
    found = alibi.inputs(a, rows)
    if a.q_segment_ids is not None and a.kv_segment_ids is not None:
        found["q_ids_gmem"] = tma.whole_blocks(a.q_segment_ids, rows)
        found["kv_ids_gmem"] = tma.whole_blocks(a.kv_segment_ids, block_kv)
    if a.key_ranges is not None:
        found["limits_gmem"] = ranges.limits(a.key_ranges, rows)
        found["visits_gmem"] = ranges.table(found["limits_gmem"], rows, block_kv, p.Sk)
    found |= {**dropping.inputs(p, a, rows), **sparsity.by_query(p, a, rows, block_kv)}
    return {**found, **bias.inputs(a, rows, block_kv)}


def scratch(p: AttentionProblem, warpgroups: int, stages: int, block_kv: int, q_stages: int = 1) -> dict[str, Any]:
    """q_stages: tiles of rows that shared memory holds; what belongs to rows has a place for each of their 64."""
    found, places = {}, q_stages * warpgroups
    if p.segments:
        found["q_ids_smem"] = plgpu.SMEM((places, 64), jnp.int32)
        found["kv_ids_smem"] = plgpu.SMEM((stages, block_kv), jnp.int32)
    if p.key_ranges:
        found["limits_smem"] = plgpu.SMEM((places, 2, 64), jnp.int32)
    tiles = sparsity.scratch(p, stages, 64 * warpgroups, block_kv)
    return {**found, **alibi.scratch(p, places, 64), **dropping.scratch(p, places, 64), **tiles}


def copies(p: AttentionProblem) -> tuple[int, int]:
    """How often copies for rows, and for a block of keys, arrive at their barrier."""
    of_rows = int(p.segments) + int(p.key_ranges) + alibi.copies(p) + dropping.copies(p)
    return of_rows, int(p.segments) + sparsity.copies(p)


def load(refs, b, row, n, barrier) -> None:
    """Starts to copy what belongs to 64 rows to place n."""
    if refs.q_ids_gmem is not None:
        ids = refs.q_ids_gmem.at[tma.batch_entry(refs.q_ids_gmem, b), pl.ds(row, 64)]
        plgpu.copy_gmem_to_smem(ids, refs.q_ids_smem.at[n], barrier)
    if refs.limits_gmem is not None:
        limits = refs.limits_gmem.at[tma.batch_entry(refs.limits_gmem, b), :, pl.ds(row, 64)]
        plgpu.copy_gmem_to_smem(limits, refs.limits_smem.at[n], barrier)


def load_of_head(refs, b, h, row, n, barrier) -> None:
    """Starts to copy what belongs to some rows of a head to place n."""
    alibi.load(refs, b, h, row, n, barrier)
    dropping.load(refs, b, h, row, n, barrier)


def load_keys(refs, b, first, slot, barrier) -> None:
    """Starts to copy what belongs to a block of keys."""
    if refs.kv_ids_gmem is not None:
        columns = pl.ds(first, refs.kv_ids_smem.shape[1])
        ids = refs.kv_ids_gmem.at[tma.batch_entry(refs.kv_ids_gmem, b), columns]
        plgpu.copy_gmem_to_smem(ids, refs.kv_ids_smem.at[slot], barrier)


def key_blocks(p: AttentionProblem, refs, work: Work, rows: int, block_kv: int) -> Range:
    """The key blocks of a tile of rows."""
    if refs.visits_gmem is None:
        return ranges.key_blocks(p, work.block * rows, rows, block_kv)
    b = tma.batch_entry(refs.visits_gmem, work.b)
    return Range(*(refs.visits_gmem[b, work.block, n] for n in range(4)))


class QueryRows(NamedTuple):
    first: jax.Array  # the number of the first of the 64
    keys: Range  # the key blocks they visit
    slope: Any  # see `alibi.read`
    ids: Any  # segment ids [64]
    limits: Any  # the first and the last key of each row, each [64]


def read(refs, work: Work, n, first, keys: Range) -> QueryRows:
    """What has arrived for the 64 rows at place n, in registers; a fence, for TMA brings those of a later tile."""
    ids = limits = None
    slope = alibi.read(refs, work.b, work.h, n, softmax.ROWS)
    if refs.q_ids_smem is not None:
        ids = _compat.load(refs.q_ids_smem.at[n], softmax.ROWS)
    if refs.limits_smem is not None:
        limits = [_compat.load(refs.limits_smem.at[n, m], softmax.ROWS) for m in range(2)]
    if ids is not None or limits is not None:
        plgpu.commit_smem()
    return QueryRows(first, keys, slope, ids, limits)


def start(refs, work: Work) -> Softmax:
    """Of 64 rows before any key, or as if there had been one: a sink, whose value is 0."""
    if refs.sinks_gmem is None:
        return softmax.start(64)
    return softmax.start(64, refs.sinks_gmem[tma.batch_entry(refs.sinks_gmem, work.b), work.h], 1.0)


def key_ids(refs, slot):
    """The segment ids of a key block in registers, or None; a fence, for TMA refills their slot."""
    if refs.kv_ids_smem is None:
        return None
    ids = _compat.load(refs.kv_ids_smem.at[slot], masking.COLUMNS)
    plgpu.commit_smem()
    return ids


def sees_all(p: AttentionProblem, block_kv: int) -> bool:
    """Whether every row sees every key of every block, so that nothing is ever -inf."""
    limited = p.left is not None or p.right is not None or p.key_ranges or p.segments
    limited = limited or p.mask_shape is not None or p.bias_shape is not None  # a bias may be -inf
    return not limited and p.Sk % block_kv == 0


class KeyBlock(NamedTuple):
    """A block of keys as the rows of a consumer meet it."""

    slot: Any
    number: jax.Array
    whole: Any  # whether its list says that nothing of it is hidden; None: there is no list
    bias: Any = None  # of its scores


def key_block(refs, rows, step, slot, block_kv: int, interpret: _compat.Interpret) -> KeyBlock:
    """The keys of a step, their bias on its way. rows: those of a kernel, with their work, queries and visits."""
    block, whole = rows.visits.at(step)
    at = rows.work.b, rows.work.h, rows.queries.first, block * block_kv
    return KeyBlock(slot, block, whole, bias.tile(refs.bias_gmem, *at, (64, block_kv), False, interpret))


def from_slot(
    p: AttentionProblem, refs, rows: QueryRows, part, keys: KeyBlock, products, interpret: _compat.Interpret, release
) -> Scores:
    """`scored` for the rows of that number and the keys in a slot; calls `release` when it is done with the slot."""
    if keys.whole is None:
        ids = key_ids(refs, keys.slot)
        release()
        return scored(p, rows, keys.number, products, ids, interpret, keys.bias)
    found = scored(p, rows, keys.number, products, None, interpret, keys.bias)
    hide = functools.partial(_hide_some, refs, rows, part, keys.slot, interpret)
    s = lax.cond(keys.whole, lambda s: s, hide, found.s)
    plgpu.commit_smem()  # TMA refills the slot
    release()
    return found._replace(s=s)


def _hide_some(refs, rows: QueryRows, part, slot, interpret: _compat.Interpret, s) -> jax.Array:
    """-inf where the mask or the segment ids hide a score."""
    ids = None if refs.kv_ids_smem is None else _compat.load(refs.kv_ids_smem.at[slot], masking.COLUMNS)
    return sparsity.hide(s, sparsity.read(refs, slot, part), rows.ids, ids, interpret)


def scored(
    p: AttentionProblem, rows: QueryRows, block, products, ids, interpret: _compat.Interpret, added=None
) -> Scores:
    """The scores of a block of keys from products q k^T [64, block_kv], -inf where one is not seen."""
    block_kv = products.shape[1]
    start = block * block_kv
    far = functools.partial(alibi.of_rows, rows.slope, rows.first + p.offset - start, start, products.shape, interpret)
    s, factor, slope = scores.modify(p, products, far, interpret, added)
    if p.left is not None or p.right is not None or p.key_ranges or p.Sk % block_kv:
        cut = (block < rows.keys.full_lo) | (block >= rows.keys.full_hi)
        s = lax.cond(cut, functools.partial(_hide, p, rows, block, interpret), lambda s: s, s)
    if ids is not None:
        s = masking.hide_other_segments(s, rows.ids, ids)
    return Scores(s, factor, slope)


def _hide(p: AttentionProblem, rows: QueryRows, block, interpret, s) -> jax.Array:
    start = block * s.shape[1]
    if rows.limits is not None:
        low, high = (limit - start for limit in rows.limits)
        return masking.hide_columns(s, low, high, interpret)
    row = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=softmax.ROWS)
    here = row + (rows.first + p.offset - start)  # the query's own position, as a column
    last = p.Sk - 1 - start
    high = jnp.minimum(here + p.right, last) if p.right is not None else softmax.row_values(last, 64, jnp.int32)
    return masking.hide_columns(s, None if p.left is None else here - p.left, high, interpret)

"""A CTA's key rows against blocks of queries: which blocks those are, what they see, how scores are bent.

The mirror of `query_rows`, for the kernels that keep keys still and walk over queries. Features that were not
asked for are None in `refs` and leave nothing in the kernel.
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
from pallas_kernels.parts import alibi, bias, dropping, masking, query_rows, ranges, scores, softmax, sparsity, tma
from pallas_kernels.parts.ranges import Range
from pallas_kernels.parts.schedule import Work
from pallas_kernels.parts.scores import Scores
from pallas_kernels.parts.sparsity import Visits
from pallas_kernels.problem import AttentionArrays, AttentionProblem


class Block(NamedTuple):
    """The shape of a step: block_kv keys of a CTA, block_q queries."""

    kv: int
    q: int


def inputs(p: AttentionProblem, a: AttentionArrays, block: Block) -> dict[str, jax.Array]:
    """The arrays of the features of a call."""
    found = query_rows.inputs(p, a, block.q, block.kv)
    if "visits_gmem" in found:
        found["visitors_gmem"] = ranges.visitors(found["visits_gmem"], -(-p.Sk // block.kv))
    return {**found, **sparsity.by_key(p, a, block.kv, block.q)}


def order(features: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The order of a call's key blocks where it is known at run time only, see `schedule.placed`."""
    if "visitors_gmem" not in features or "listed_gmem" in features:
        return sparsity.order(features)
    visitors = features["visitors_gmem"]
    return {"order_gmem": ranges.longest_first(visitors[..., 0], visitors[..., 1])}


def scratch(p: AttentionProblem, stages: int, block: Block, interpret: _compat.Interpret = None) -> dict[str, Any]:
    found = {}
    if p.segments:
        found["kv_ids_smem"] = plgpu.SMEM((block.kv,), jnp.int32)
        found["q_ids_smem"] = plgpu.SMEM((stages, block.q), jnp.int32)
    if p.key_ranges:
        found["limits_smem"] = plgpu.SMEM((stages, 2, block.q), jnp.int32)
    found |= {**alibi.scratch(p, stages, block.q), **dropping.scratch(p, stages, block.q)}
    found |= sparsity.scratch(p, stages, block.kv, block.q)
    return {**found, **bias.staging(p, block.kv // 64, block.q, 64, interpret)}


def copies(p: AttentionProblem) -> tuple[int, int]:
    """How often copies for a block of queries, and for the keys, arrive at their barrier."""
    with_q = int(p.key_ranges) + alibi.copies(p) + dropping.copies(p) + sparsity.copies(p)
    return int(p.segments) + with_q, int(p.segments)


def load(refs, b, row, slot, barrier, block: Block) -> None:
    """Starts to copy what belongs to a block of queries."""
    if refs.q_ids_gmem is not None:
        ids = refs.q_ids_gmem.at[tma.batch_entry(refs.q_ids_gmem, b), pl.ds(row, block.q)]
        plgpu.copy_gmem_to_smem(ids, refs.q_ids_smem.at[slot], barrier)
    if refs.limits_gmem is not None:
        limits = refs.limits_gmem.at[tma.batch_entry(refs.limits_gmem, b), :, pl.ds(row, block.q)]
        plgpu.copy_gmem_to_smem(limits, refs.limits_smem.at[slot], barrier)


def load_keys(refs, b, row, barrier, block: Block) -> None:
    """Starts to copy what belongs to the keys."""
    if refs.kv_ids_gmem is not None:
        ids = refs.kv_ids_gmem.at[tma.batch_entry(refs.kv_ids_gmem, b), pl.ds(row, block.kv)]
        plgpu.copy_gmem_to_smem(ids, refs.kv_ids_smem, barrier)


class Walk(NamedTuple):
    """The query blocks of a CTA: those of `rows`, for each query head of the group in turn, or those of its list."""

    rows: Range
    steps: jax.Array
    first_head: jax.Array
    group: int
    blocks: int = 0  # this and the next are of a list: query blocks of a head
    visits: Visits | None = None

    def at(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Query head and query block of a step."""
        visit = self.visit(step)
        if visit is not None:
            return visit[:2]
        if self.group == 1:
            return self.first_head, self.rows.lo + step
        each = jnp.maximum(self.rows.hi - self.rows.lo, 1)
        return self.first_head + lax.div(step, each), self.rows.lo + lax.rem(step, each)

    def visit(self, step: jax.Array) -> tuple[jax.Array, jax.Array, Any] | None:
        """Those, and whether nothing of the tile is hidden, if the walk is a list: a read of global memory."""
        if self.visits is None:
            return None
        place, whole = self.visits.at(step)
        return self.first_head + lax.div(place, jnp.int32(self.blocks)), lax.rem(place, jnp.int32(self.blocks)), whole


def walk(p: AttentionProblem, refs, work: Work, block: Block) -> Walk:
    rows = _query_blocks(p, refs, work, block)
    if sparsity.is_listed(p):
        visits = sparsity.visits(p, refs, work, rows)
        return Walk(rows, visits.steps, work.h * p.group, p.group, -(-p.Sq // block.q), visits)
    return Walk(rows, (rows.hi - rows.lo) * p.group, work.h * p.group, p.group)


def _query_blocks(p: AttentionProblem, refs, work: Work, block: Block) -> Range:
    """The query blocks that see a CTA's keys."""
    if refs.visitors_gmem is None:
        return ranges.query_blocks(p, work.block * block.kv, block.kv, block.q)
    b = tma.batch_entry(refs.visitors_gmem, work.b)
    lo, hi = (refs.visitors_gmem[b, work.block, n] for n in range(2))
    return Range(lo, lo, hi, hi)  # `_hide_by_limits` asks each query block what of it needs a mask


class KeyRows(NamedTuple):
    """64 rows of the CTA's keys, from `offset` of them on."""

    work: Work
    walk: Walk
    block: Block
    offset: Any
    visit: Any = None  # this and the next are of a step, read `ahead`
    bias: Any = None

    @property
    def first(self):
        """The number of the first key."""
        return self.work.block * self.block.kv + self.offset

    def at(self, step) -> tuple[jax.Array, jax.Array]:
        """Query head and query block of the step."""
        return self.walk.at(step) if self.visit is None else self.visit[:2]


def ahead(p: AttentionProblem, refs, work: Work, walk: Walk, block: Block, part, step, interpret: _compat.Interpret):
    """What a step reads from global memory, on its way while products are formed: its visit and its bias, or None."""
    visit = walk.visit(step)
    if p.bias_shape is None:
        return visit, None
    rows = KeyRows(work, walk, block, part * 64, visit)
    head, number = rows.at(step)
    at = work.b, head, number * block.q, rows.first
    return visit, bias.tile(refs.bias_gmem, *at, (64, block.q), True, interpret)


def scored(p: AttentionProblem, refs, rows: KeyRows, step, slot, products, interpret: _compat.Interpret) -> Scores:
    """The scores of the query block of a step from products k q^T [64, block_q], -inf where one is not seen."""
    s, factor, slope = _modify(p, refs, rows, step, slot, products, interpret)
    if refs.limits_smem is None:
        s = _hide(p, rows, step, s, interpret)
    else:
        s = _hide_by_limits(refs, rows, step, slot, s)
    if rows.visit is not None:
        s = lax.cond(rows.visit[2], lambda s: s, functools.partial(_hide_some, refs, rows, slot, interpret), s)
    elif refs.kv_ids_smem is not None:
        s = masking.hide_other_segments(s, *_ids(refs, rows, slot))
    return Scores(s, factor, slope)


def _ids(refs, rows: KeyRows, slot):
    """The segment ids of the keys and of a block of queries, in registers."""
    of_keys = _compat.load(refs.kv_ids_smem.at[pl.ds(rows.offset, 64)], softmax.ROWS)
    return of_keys, _compat.load(refs.q_ids_smem.at[slot], masking.COLUMNS)


def _hide_some(refs, rows: KeyRows, slot, interpret: _compat.Interpret, s) -> jax.Array:
    """-inf where the mask or the segment ids hide a score."""
    ids = (None, None) if refs.kv_ids_smem is None else _ids(refs, rows, slot)
    return sparsity.hide(s, sparsity.read(refs, slot, lax.div(rows.offset, 64)), *ids, interpret)


def _modify(p: AttentionProblem, refs, rows: KeyRows, step, slot, products, interpret: _compat.Interpret) -> Scores:
    """Softcap, bias and ALiBi."""
    head, block = rows.at(step)
    slope = alibi.read(refs, rows.work.b, head, slot, masking.COLUMNS)
    apart = rows.work.block * rows.block.kv + rows.offset - (block * rows.block.q + p.offset)
    far = functools.partial(alibi.of_columns, slope, apart, rows.first, products.shape, interpret)
    return scores.modify(p, products, far, interpret, rows.bias)


def _hide(p: AttentionProblem, rows: KeyRows, step, s, interpret: _compat.Interpret) -> jax.Array:
    """-inf where an edge of the mask, or the end of the keys, cuts a tile of S^T."""
    size = rows.block
    ragged = p.Sk % size.kv != 0
    if p.left is None and p.right is None and not ragged:
        return s
    _, block = rows.at(step)
    cut = (block < rows.walk.rows.full_lo) | (block >= rows.walk.rows.full_hi)
    if ragged:
        cut = cut | (rows.work.block == p.Sk // size.kv)

    def hide(s):
        key = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=softmax.ROWS)
        key = key + (rows.work.block * size.kv + rows.offset)
        here = key - (p.offset + block * size.q)  # the query at the key's own position, as a column
        high = softmax.row_values(size.q - 1, 64, jnp.int32) if p.left is None else here + p.left
        if ragged:
            high = jnp.where(key < p.Sk, high, -1)
        return masking.hide_columns(s, None if p.right is None else here - p.right, high, interpret)

    return lax.cond(cut, hide, lambda s: s, s)


def _hide_by_limits(refs, rows: KeyRows, step, slot, s) -> jax.Array:
    """-inf where a key is not in its query's own range."""
    work = rows.work
    _, block = rows.at(step)
    b = tma.batch_entry(refs.visits_gmem, work.b)
    full_lo, full_hi = (refs.visits_gmem[b, block, n] for n in (1, 2))

    def hide(s):
        key = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=softmax.ROWS)
        key = softmax.over_columns(key + (work.block * rows.block.kv + rows.offset), s.shape)
        first = _compat.load(refs.limits_smem.at[slot, 0], masking.COLUMNS)
        s = jnp.where(key >= over_rows(first, s.shape), s, -jnp.inf)
        last = _compat.load(refs.limits_smem.at[slot, 1], masking.COLUMNS)
        return jnp.where(key <= over_rows(last, s.shape), s, -jnp.inf)

    return lax.cond((work.block < full_lo) | (work.block >= full_hi), hide, lambda s: s, s)


def add_to_bias(p: AttentionProblem, refs, rows: KeyRows, step, part, ds, interpret: _compat.Interpret) -> None:
    """Adds dS^T [64, block_q] of a step to the gradient of the bias, if that is wanted. part: which consumer."""
    if p.bias_gradient and refs.d_bias_gmem is not None:
        head, block = rows.at(step)
        staging = None if refs.d_bias_smem is None else refs.d_bias_smem.at[part]
        at = rows.work.b, head, block * rows.block.q, rows.first
        bias.add(p, refs.d_bias_gmem, staging, *at, ds, interpret)


def over_rows(x: jax.Array, shape) -> jax.Array:
    """One value a query, for every key."""
    return lax.broadcast_in_dim(x, shape, [1])

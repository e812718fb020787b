"""Forward of L1 attention: out = softmax(s(d)) v and lse, with d_ij = sum_w |q_iw - k_jw|.

The distances take nearly all of the time, on the CUDA cores: float32 ones two instructions for a feature of a pair
(see `l1_distances`), 16-bit ones half of one and the tensor cores (see `l1_maxima`).

Who does what. A CTA takes query rows of one head, 64 or 128 for each consumer warpgroup. One warp of the last
warpgroup, the producer, copies Q once and then K and V block by block into rings of `stages` slots. A consumer forms
a block of distances, then its softmax, then the product with V on the tensor cores; meanwhile the other consumer has
the CUDA cores to itself.

A float32 product is made of bfloat16 ones, see `split`. Each block's product is formed on its own and added in
float32 here: the tensor cores' own sums are cut off, not rounded.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, l1_tiles, tiles
from pallas_kernels.l1_tiles import L1ForwardTile
from pallas_kernels.parts import (
    barriers,
    l1_distances,
    l1_maxima,
    l1_scores,
    masking,
    query_rows,
    schedule,
    softmax,
    split,
    swizzled_rows,
    tma,
)
from pallas_kernels.parts.query_rows import QueryRows
from pallas_kernels.parts.ranges import Range
from pallas_kernels.parts.schedule import Schedule, Work
from pallas_kernels.parts.softmax import Softmax
from pallas_kernels.parts.swizzled_rows import RowsType
from pallas_kernels.problem import AttentionArrays, L1Problem

WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    problem: L1Problem
    tile: L1ForwardTile
    schedule: Schedule
    interpret: _compat.Interpret

    @property
    def parts(self) -> int:
        return l1_tiles.parts(self.problem)

    @property
    def packed(self) -> bool:
        return l1_tiles.packed(self.problem)

    @property
    def tiles(self) -> int:
        """Tiles of 64 query rows."""
        return self.tile.warpgroups * self.tile.halves

    @property
    def q(self) -> RowsType:
        return self._rows(self.tiles, 64)

    @property
    def k(self) -> RowsType:
        return self._rows(self.tile.stages, self.tile.block_kv)

    def _rows(self, count: int, rows: int) -> RowsType:
        dtype = jnp.dtype(self.problem.dtype) if self.packed else jnp.dtype(jnp.float32)
        return RowsType(count, rows, self.problem.D, dtype)

    @property
    def out(self) -> RowsType:
        return RowsType(self.tiles, 64, tiles.padded(self.problem.Dv), jnp.dtype(self.problem.dtype))

    @property
    def v(self) -> tma.TileType:
        """The parts of a block of values lie one behind the other."""
        p, t = self.problem, self.tile
        dtype = jnp.bfloat16 if self.parts > 1 else jnp.dtype(p.dtype)
        columns = tiles.padded(p.Dv)
        return tma.TileType(t.stages * self.parts, t.block_kv, columns, dtype, tma.is_ragged(p), self.interpret)


class Refs(NamedTuple):
    """What a kernel sees; a feature that was not asked for is None."""

    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    out_gmem: Any
    lse_gmem: Any
    q_smem: Any
    k_smem: Any
    v_smem: Any
    out_smem: Any
    lse_smem: Any
    q_full: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    q_sums_gmem: Any = None  # of the features of each row, where packed
    k_sums_gmem: Any = None
    q_sums_smem: Any = None
    k_sums_smem: Any = None
    sinks_gmem: Any = None
    slopes_gmem: Any = None
    q_ids_gmem: Any = None
    kv_ids_gmem: Any = None
    q_ids_smem: Any = None
    kv_ids_smem: Any = None
    limits_gmem: Any = None
    limits_smem: Any = None
    visits_gmem: Any = None


def l1_forward(
    p: L1Problem, a: AttentionArrays, *, tile: L1ForwardTile | None = None, interpret: _compat.Interpret = None
) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] in the input dtype and lse [B, H, Sq] in float32."""
    plan = make_plan(p, tile or l1_tiles.forward_tile(p), interpret)
    t = plan.tile
    inputs = {
        "q_gmem": swizzled_rows.crossed(plan.q.fit(a.q, t.rows)),
        "k_gmem": plan.k.fit(a.k, t.block_kv),
        "v_gmem": tma.fit(split.in_memory(a.v, plan.parts), t.block_kv),
        **query_rows.inputs(p, a, t.rows, t.block_kv),
    }
    if plan.packed:
        inputs["q_sums_gmem"] = l1_maxima.row_sums(a.q, plan.schedule.blocks * t.rows)
        inputs["k_sums_gmem"] = l1_maxima.row_sums(a.k, -(-p.Sk // t.block_kv) * t.block_kv)
    if a.sinks is not None:
        inputs["sinks_gmem"] = a.sinks.astype(jnp.float32) * softmax.LOG2E
    columns = tma.fitted(p.Dv)
    kernel = _compat.kernel(
        functools.partial(_kernel, plan, (*inputs, "out_gmem", "lse_gmem")),
        name="l1_forward",
        out_type=(
            jax.ShapeDtypeStruct((p.B, max(p.Sq, t.rows), p.H, columns), a.q.dtype),
            jax.ShapeDtypeStruct((p.B, p.H, plan.schedule.blocks * t.rows), jnp.float32),
        ),
        scratch=_scratch(plan),
        grid=(plan.schedule.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(t.warpgroups, 1, interpret),
        interpret=interpret,
    )
    out, lse = kernel(*inputs.values())
    return out[:, : p.Sq, :, : p.Dv], lse[:, :, : p.Sq]


def make_plan(p: L1Problem, tile: L1ForwardTile, interpret: _compat.Interpret = None) -> Plan:
    order = Schedule(
        batch=p.B,
        heads=p.H,
        blocks=-(-p.Sq // tile.rows),
        section=schedule.section(p.B * p.H, p.group, 8 * p.Sk * (p.D + p.Dv)) if p.right is not None else 1,
        descending=p.right is not None,
    )
    return Plan(p, tile, order, interpret)


def _scratch(plan: Plan) -> dict[str, Any]:
    p, t = plan.problem, plan.tile
    with_q, with_k = query_rows.copies(p)
    sums = {}
    if plan.packed:
        sums["q_sums_smem"] = plgpu.SMEM((plan.tiles, 64), jnp.float32)
        sums["k_sums_smem"] = plgpu.SMEM((t.stages, t.block_kv), jnp.float32)
    return {
        **sums,
        "q_smem": plan.q.scratch,
        "k_smem": plan.k.scratch,
        "v_smem": plan.v.scratch,
        "out_smem": plan.out.scratch,
        "lse_smem": plgpu.SMEM((plan.tiles, 64), jnp.float32),
        **query_rows.scratch(p, plan.tiles, t.stages, t.block_kv),
        "q_full": plgpu.Barrier(num_arrivals=plan.tiles * (plan.q.chunks + with_q + plan.packed)),
        "k_full": plgpu.Barrier(num_arrivals=plan.k.chunks + with_k + plan.packed, num_barriers=t.stages),
        "k_empty": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.stages),
        "v_full": plgpu.Barrier(num_arrivals=plan.parts * plan.v.chunks, num_barriers=t.stages),
        "v_empty": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.stages),
    }


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    scratch["v_smem"] = plan.v.view(scratch["v_smem"])
    refs = Refs(**dict(zip(names, gmem, strict=True)), **scratch)
    work, wg = plan.schedule.work(lax.axis_index("cta")), lax.axis_index("wg")
    consume = functools.partial(_consumer, plan, refs, work, wg)
    lax.cond(wg < plan.tile.warpgroups, consume, functools.partial(_producer, plan, refs, work))


def _keys(plan: Plan, refs: Refs, work: Work) -> Range:
    """The key blocks of a tile: at least one, wholly masked if need be."""
    t = plan.tile
    keys = query_rows.key_blocks(plan.problem, refs, work, t.rows, t.block_kv)
    last = jnp.minimum(keys.lo, -(-plan.problem.Sk // t.block_kv) - 1)
    return keys._replace(lo=last, hi=jnp.maximum(keys.hi, last + 1))


def _producer(plan: Plan, refs: Refs, work: Work) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    barriers.in_warps([functools.partial(_load, plan, refs, work)], 0, plan.interpret)


def _load(plan: Plan, refs: Refs, work: Work) -> None:
    p, t = plan.problem, plan.tile
    keys = _keys(plan, refs, work)
    kv_head = lax.div(work.h, jnp.int32(p.group))
    for n in range(plan.tiles):
        row = work.block * t.rows + n * 64
        plan.q.load(refs.q_smem, refs.q_gmem, work.b, row, work.h, n, refs.q_full)
        query_rows.load(refs, work.b, row, n, refs.q_full)
        if plan.packed:
            sums = refs.q_sums_gmem.at[work.b, work.h, pl.ds(row, 64)]
            plgpu.copy_gmem_to_smem(sums, refs.q_sums_smem.at[n], refs.q_full)

    def load_block(step, _):
        slot, row = lax.rem(step, t.stages), (keys.hi - 1 - step) * t.block_kv
        pl.when(step >= t.stages)(lambda: plgpu.barrier_wait(refs.k_empty.at[slot]))
        plan.k.load(refs.k_smem, refs.k_gmem, work.b, row, kv_head, slot, refs.k_full.at[slot])
        query_rows.load_keys(refs, work.b, row, slot, refs.k_full.at[slot])
        if plan.packed:
            sums = refs.k_sums_gmem.at[work.b, kv_head, pl.ds(row, t.block_kv)]
            plgpu.copy_gmem_to_smem(sums, refs.k_sums_smem.at[slot], refs.k_full.at[slot])
        pl.when(step >= t.stages)(lambda: plgpu.barrier_wait(refs.v_empty.at[slot]))
        for n in range(plan.parts):
            of_part = n * p.B + work.b
            refs.v_smem.load(refs.v_gmem, of_part, row, kv_head, slot * plan.parts + n, refs.v_full.at[slot])

    lax.fori_loop(0, keys.hi - keys.lo, load_block, None)


class Carry(NamedTuple):
    """What 64 query rows have so far."""

    acc: jax.Array  # [64, Dv]
    state: Softmax


def _consumer(plan: Plan, refs: Refs, work: Work, wg) -> None:
    plgpu.set_max_registers(plan.tile.registers, action="increase")
    keys = _keys(plan, refs, work)
    plgpu.barrier_wait(refs.q_full)
    mine = [wg * plan.tile.halves + n for n in range(plan.tile.halves)]
    rows = [query_rows.read(refs, work, n, work.block * plan.tile.rows + n * 64, keys) for n in mine]
    acc = plgpu.layout_cast(jnp.zeros((64, tiles.padded(plan.problem.Dv)), jnp.float32), WGMMA)
    carry = [Carry(acc, _start(refs, work)) for _ in rows]
    carry = lax.fori_loop(0, keys.hi - keys.lo, functools.partial(_step, plan, refs, mine[0], rows), carry)
    for n, x in zip(mine, carry, strict=True):
        _epilogue(plan, refs, n, work, x)
    plgpu.wait_smem_to_gmem(0)


def _start(refs: Refs, work: Work) -> Softmax:
    """No key yet, or as if there had been one: a sink, whose value is 0."""
    if refs.sinks_gmem is None:
        return softmax.start(64)
    return softmax.start(64, refs.sinks_gmem[tma.batch_entry(refs.sinks_gmem, work.b), work.h], 1.0)


def _step(plan: Plan, refs: Refs, first, rows: list[QueryRows], step, carry: list[Carry]) -> list[Carry]:
    """Takes a block of keys into the running softmax and sum of each 64 rows."""
    slot = lax.rem(step, plan.tile.stages)
    plgpu.barrier_wait(refs.k_full.at[slot])
    negative = _negative_distances(plan, refs, first, slot)
    ids = query_rows.key_ids(refs, slot)
    barriers.fence(plan.interpret)
    plgpu.barrier_arrive(refs.k_empty.at[slot])
    plgpu.barrier_wait(refs.v_full.at[slot])
    block = rows[0].keys.hi - 1 - step
    take = functools.partial(_take, plan, refs, slot, block, ids)
    carry = [take(*each) for each in zip(rows, negative, carry, strict=True)]
    plgpu.barrier_arrive(refs.v_empty.at[slot])
    return carry


def _negative_distances(plan: Plan, refs: Refs, first, slot) -> list[jax.Array]:
    """-d of the rows of tiles first, first + 1, ... of a consumer and a block of keys, each [64, block_kv]."""
    count = plan.tile.halves
    operands = (refs.q_smem, first, count, refs.k_smem, slot, plan.interpret)
    if not plan.packed:
        return l1_distances.negative_distances(*operands)
    maxima = l1_maxima.sums_of_maxima(*operands)
    k_sums = _compat.load(refs.k_sums_smem.at[slot], masking.COLUMNS)
    q_sums = [_compat.load(refs.q_sums_smem.at[first + n], softmax.ROWS) for n in range(count)]
    return [l1_maxima.negative_distances(m, x, k_sums) for m, x in zip(maxima, q_sums, strict=True)]


def _take(plan: Plan, refs: Refs, slot, block, ids, rows: QueryRows, negative, carry: Carry) -> Carry:
    p = plan.problem
    s, factor = _scored(plan, rows, block, negative, ids)
    guarded = not query_rows.sees_all(p, plan.tile.block_kv)
    state, weights, fade = softmax.step(carry.state, s, factor, guarded)
    weights = split.in_registers(weights, plan.parts, plan.v.dtype)

    def product(acc):
        for m, n in split.products(plan.parts):
            tma.product(acc, weights[m], refs.v_smem, slot * plan.parts + n)
        return acc[...]

    more = pl.run_scoped(product, plgpu.ACC(carry.acc.shape, jnp.float32))
    return Carry(carry.acc * softmax.over_columns(fade, more.shape) + more, state)


def _scored(plan: Plan, rows: QueryRows, block, negative, ids) -> tuple[jax.Array, float]:
    """Scores in units of 1 / factor in base 2, -inf where a key is not seen."""
    s, unit, _ = l1_scores.of_distances(plan.problem, negative)
    s, factor, _ = query_rows.scored(unit, rows, block, s, ids, plan.interpret)
    return s, factor


def _epilogue(plan: Plan, refs: Refs, n, work: Work, carry: Carry) -> None:
    """Divides and writes out the rows of tile n."""
    inverse, lse = softmax.finish(carry.state)
    out = carry.acc * softmax.over_columns(inverse, carry.acc.shape)
    plan.out.write(refs.out_smem, n, out.astype(plan.problem.dtype), plan.interpret)
    refs.lse_smem[n] = lse
    plgpu.commit_smem()
    row = work.block * plan.tile.rows + n * 64
    plan.out.store(refs.out_smem, refs.out_gmem, work.b, row, work.h, n)
    plgpu.copy_smem_to_gmem(refs.lse_smem.at[n], refs.lse_gmem.at[work.b, work.h, pl.ds(row, 64)])

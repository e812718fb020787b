"""Backward: dQ, dK and dV from Q, K, V, dO and two row statistics, in one pass over the scores.

    P = 2^(scale log2(e) Q K^T - lse2)    dV = P^T dO    dS = P (dO V^T - delta)    dK = scale dS^T Q    dQ = scale dS K

Who does what. A CTA owns a block of keys, 64 rows for each of two consumer warpgroups, and walks over the
query blocks of every query head that reads them. It forms S^T and dP^T, so that P^T and dS^T are in
registers just as dV and dK want them; both stay in registers for the whole walk. dS^T goes through shared
memory once, because dQ wants the other orientation and all the keys. Each consumer forms half of the dQ
tile and leaves it in shared memory in register order; a warp of the last warpgroup has TMA add it to a
float32 buffer in global memory, which `attention_dq` turns into dQ afterwards. Another warp loads.

The walk and the five products follow Shah et al., FlashAttention-3 (arXiv 2407.08608).
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

from pallas_kernels import _compat, tiles
from pallas_kernels.parts import (
    barriers,
    descriptors,
    masking,
    query_rows,
    ranges,
    register_order,
    schedule,
    scores,
    softmax,
    tma,
)
from pallas_kernels.parts.barriers import NamedBarrier
from pallas_kernels.parts.ranges import Range
from pallas_kernels.parts.schedule import Schedule, Work
from pallas_kernels.problem import AttentionArrays, AttentionProblem
from pallas_kernels.tiles import BackwardTile

CONSUMERS = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    problem: AttentionProblem
    tile: BackwardTile
    schedule: Schedule
    any_row: bool
    interpret: _compat.Interpret

    @property
    def query_blocks(self) -> int:
        return -(-self.problem.Sq // self.tile.block_q)

    @property
    def dq_tile(self) -> tuple[int, int]:
        """Rows and columns of the part of a dQ tile that one consumer forms."""
        columns = tiles.padded(self.problem.D)
        if self.tile.split_rows:
            return self.tile.block_q // CONSUMERS, columns
        return self.tile.block_q, columns // CONSUMERS

    @property
    def dq_shape(self) -> tuple[int, ...]:
        """The float32 buffer: a part for each consumer, in register order."""
        p = self.problem
        return (p.B, p.H, self.query_blocks, CONSUMERS, *register_order.memory_shape(*self.dq_tile))

    @property
    def meeting(self) -> NamedBarrier:
        return NamedBarrier(0, threads=128 * CONSUMERS, meeting=CONSUMERS, interpret=self.interpret)

    @property
    def dq_full(self) -> NamedBarrier:
        """Between a consumer and the warp that stores dQ."""
        return NamedBarrier(1, threads=128 + 32, count=CONSUMERS, interpret=self.interpret)

    @property
    def dq_empty(self) -> NamedBarrier:
        return NamedBarrier(1 + CONSUMERS, threads=128 + 32, count=CONSUMERS, interpret=self.interpret)

    def tile_type(self, count: int, rows: int, columns: int) -> tma.TileType:
        dtype = jnp.dtype(self.problem.dtype)
        return tma.TileType(count, rows, tiles.padded(columns), dtype, self.any_row, self.interpret)


class Refs(NamedTuple):
    """What a kernel sees; a feature that was not asked for is None."""

    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    do_gmem: Any
    lse_gmem: Any
    delta_gmem: Any
    dk_gmem: Any
    dv_gmem: Any
    q_smem: Any
    do_smem: Any
    k_smem: Any
    v_smem: Any
    lse_smem: Any
    delta_smem: Any
    kv_full: Any
    q_full: Any
    q_do_empty: Any
    do_full: Any
    meeting: Any
    dq_gmem: Any = None  # this and the next four only where dQ is added here
    ds_smem: Any = None
    dq_smem: Any = None
    dq_full: Any = None
    dq_empty: Any = None
    slopes_gmem: Any = None
    q_ids_gmem: Any = None
    kv_ids_gmem: Any = None
    q_ids_smem: Any = None
    kv_ids_smem: Any = None
    limits_gmem: Any = None  # [B|1, 2, rows]: the first and the last key of each query
    limits_smem: Any = None
    visits_gmem: Any = None  # see ranges.table
    visitors_gmem: Any = None  # see ranges.visitors


def attention_backward(
    p: AttentionProblem, a: AttentionArrays, d_out, lse2, delta, dq, *, interpret: _compat.Interpret = None
) -> tuple[jax.Array, jax.Array]:
    """Adds dQ / scale to the accumulator `dq` (see `Plan.dq_shape`) and returns dK and dV.

    For a deterministic problem `dq` is None, and dQ is left to `attention_backward_q`.
    lse2 = lse log2(e), float32 [B, H, Sq padded to whole blocks], +inf for rows without a gradient.
    delta = rowsum(dO O) - dlse, in the same shape.
    """
    plan = make_plan(p, interpret)
    q, d_out = (tma.fit(x, plan.tile.block_q) for x in (a.q, d_out))
    k, v = (tma.fit(x, plan.tile.block_kv) for x in (a.k, a.v))
    inputs = {
        **{"q_gmem": q, "k_gmem": k, "v_gmem": v, "do_gmem": d_out, "lse_gmem": lse2, "delta_gmem": delta},
        **_features(plan, a),
        **({} if dq is None else {"dq_gmem": dq}),
    }
    kernel = _compat.kernel(
        functools.partial(_kernel, plan, (*inputs, "dk_gmem", "dv_gmem")),
        name="attention_backward",
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch=_scratch(plan),
        grid=(plan.schedule.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(CONSUMERS, 1 if dq is None else 2, interpret),
        interpret=interpret,
    )
    dk, dv = kernel(*inputs.values())
    return dk[:, : p.Sk, :, : p.D], dv[:, : p.Sk, :, : p.Dv]


def _features(plan: Plan, a: AttentionArrays) -> dict[str, jax.Array]:
    """What the call has beyond the usual, as the kernel wants it."""
    found = query_rows.inputs(plan.problem, a, plan.tile.block_q, plan.tile.block_kv)
    if "visits_gmem" in found:
        found["visitors_gmem"] = ranges.visitors(found["visits_gmem"], plan.schedule.blocks)
    return found


def make_plan(p: AttentionProblem, interpret: _compat.Interpret = None) -> Plan:
    tile = tiles.backward_tile(p)
    # Ascending blocks: the first keys have the longest walk.
    bytes_per_head = p.Sq * (2 * (p.D + p.Dv) + 4 * p.D) * p.group
    order = Schedule(
        batch=p.B,
        heads=p.Hk,
        blocks=-(-p.Sk // tile.block_kv),
        section=schedule.section(p.B * p.Hk, 1, bytes_per_head, budget=40 * 2**20) if p.right is not None else 1,
    )
    return Plan(p, tile, order, tma.is_ragged(p), interpret)


def _tile_types(plan: Plan) -> dict[str, tma.TileType]:
    p, t = plan.problem, plan.tile
    return {
        "q_smem": plan.tile_type(t.stages, t.block_q, p.D),
        "do_smem": plan.tile_type(t.stages, t.block_q, p.Dv),
        "k_smem": plan.tile_type(1, t.block_kv, p.D),
        "v_smem": plan.tile_type(1, t.block_kv, p.Dv),
    }


def _scratch(plan: Plan) -> dict[str, Any]:
    p, t = plan.problem, plan.tile
    types = _tile_types(plan)
    smem = {name: x.scratch for name, x in types.items()}
    ids = int(p.segments)  # they travel with K and with Q
    if ids:
        smem["kv_ids_smem"] = plgpu.SMEM((t.block_kv,), jnp.int32)
        smem["q_ids_smem"] = plgpu.SMEM((t.stages, t.block_q), jnp.int32)
    limits = int(p.key_ranges)
    if limits:
        smem["limits_smem"] = plgpu.SMEM((t.stages, 2, t.block_q), jnp.int32)
    dq_barriers = {}
    if not p.deterministic:
        smem["ds_smem"] = plgpu.SMEM((t.ds_stages, t.block_kv, t.block_q), jnp.dtype(p.dtype), transforms=tma.TILED)
        smem["dq_smem"] = plgpu.SMEM((CONSUMERS, *plan.dq_shape[-2:]), jnp.float32)
        dq_barriers = {"dq_full": plan.dq_full.scratch, "dq_empty": plan.dq_empty.scratch}
    return {
        **smem,
        "lse_smem": plgpu.SMEM((t.stages, t.block_q), jnp.float32),
        "delta_smem": plgpu.SMEM((t.stages, t.block_q), jnp.float32),
        "kv_full": plgpu.Barrier(num_arrivals=types["k_smem"].chunks + types["v_smem"].chunks + ids),
        "q_full": plgpu.Barrier(num_arrivals=types["q_smem"].chunks + 1 + ids + limits, num_barriers=t.stages),
        "q_do_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=t.stages),
        "do_full": plgpu.Barrier(num_arrivals=types["do_smem"].chunks + 1, num_barriers=t.stages),
        "meeting": plan.meeting.scratch,
        **dq_barriers,
    }


class Walk(NamedTuple):
    """The query blocks of a CTA: those of `rows`, for each query head of the group in turn."""

    rows: Range
    steps: jax.Array
    first_head: jax.Array
    group: int

    def at(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Query head and query block of a step."""
        if self.group == 1:
            return self.first_head, self.rows.lo + step
        each = jnp.maximum(self.rows.hi - self.rows.lo, 1)
        return self.first_head + lax.div(step, each), self.rows.lo + lax.rem(step, each)


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    p = plan.problem
    tiles_smem = {name: x.view(scratch[name]) for name, x in _tile_types(plan).items()}
    refs = Refs(**dict(zip(names, gmem, strict=True)), **{**scratch, **tiles_smem})
    work = plan.schedule.work(lax.axis_index("cta"))
    rows = _query_blocks(plan, refs, work)
    walk = Walk(rows, (rows.hi - rows.lo) * p.group, work.h * p.group, p.group)
    wg = lax.axis_index("wg")
    consume = functools.partial(_consumer, plan, refs, work, walk, wg)
    serve = functools.partial(_servants, plan, refs, work, walk, wg - CONSUMERS)
    lax.cond(wg < CONSUMERS, consume, serve)


def _query_blocks(plan: Plan, refs: Refs, work: Work) -> Range:
    """The query blocks that see a CTA's keys."""
    t = plan.tile
    if refs.visitors_gmem is None:
        return ranges.query_blocks(plan.problem, work.block * t.block_kv, t.block_kv, t.block_q)
    b = tma.batch_entry(refs.visitors_gmem, work.b)
    lo, hi = (refs.visitors_gmem[b, work.block, n] for n in range(2))
    return Range(lo, lo, hi, hi)  # `_hide` asks each query block what of it needs a mask


def _servants(plan: Plan, refs: Refs, work: Work, walk: Walk, index) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    load = functools.partial(_loader, plan, refs, work, walk)
    store = functools.partial(_dq_storer, plan, refs, work, walk)
    barriers.in_warps([load] if refs.dq_gmem is None else [load, store], index, plan.interpret)


def _loader(plan: Plan, refs: Refs, work: Work, walk: Walk) -> None:
    t = plan.tile
    row = work.block * t.block_kv
    refs.k_smem.load(refs.k_gmem, work.b, row, work.h, 0, refs.kv_full)
    refs.v_smem.load(refs.v_gmem, work.b, row, work.h, 0, refs.kv_full)
    if refs.kv_ids_gmem is not None:
        ids = refs.kv_ids_gmem.at[tma.batch_entry(refs.kv_ids_gmem, work.b), pl.ds(row, t.block_kv)]
        plgpu.copy_gmem_to_smem(ids, refs.kv_ids_smem, refs.kv_full)

    def load_block(step, _):
        slot = lax.rem(step, t.stages)
        head, block = walk.at(step)
        row = block * t.block_q
        statistics = (work.b, head, pl.ds(row, t.block_q))

        @pl.when(step >= t.stages)
        def _():
            plgpu.barrier_wait(refs.q_do_empty.at[slot])

        refs.q_smem.load(refs.q_gmem, work.b, row, head, slot, refs.q_full.at[slot])
        plgpu.copy_gmem_to_smem(refs.lse_gmem.at[statistics], refs.lse_smem.at[slot], refs.q_full.at[slot])
        if refs.q_ids_gmem is not None:
            ids = refs.q_ids_gmem.at[tma.batch_entry(refs.q_ids_gmem, work.b), pl.ds(row, t.block_q)]
            plgpu.copy_gmem_to_smem(ids, refs.q_ids_smem.at[slot], refs.q_full.at[slot])
        if refs.limits_gmem is not None:
            limits = refs.limits_gmem.at[tma.batch_entry(refs.limits_gmem, work.b), :, pl.ds(row, t.block_q)]
            plgpu.copy_gmem_to_smem(limits, refs.limits_smem.at[slot], refs.q_full.at[slot])

        refs.do_smem.load(refs.do_gmem, work.b, row, head, slot, refs.do_full.at[slot])
        plgpu.copy_gmem_to_smem(refs.delta_gmem.at[statistics], refs.delta_smem.at[slot], refs.do_full.at[slot])

    lax.fori_loop(0, walk.steps, load_block, None)


def _dq_storer(plan: Plan, refs: Refs, work: Work, walk: Walk) -> None:
    """Has TMA add each dQ tile that the consumers leave in shared memory."""
    for w in range(CONSUMERS):
        plan.dq_empty.arrive(refs.dq_empty, w)

    def store(step, _):
        head, block = walk.at(step)
        for w in range(CONSUMERS):
            plan.dq_full.wait(refs.dq_full, w)
            target = refs.dq_gmem.at[work.b, head, block, w]
            plgpu.copy_smem_to_gmem(refs.dq_smem.at[w], target, reduction_op="add")
        for w in range(CONSUMERS):
            plgpu.wait_smem_to_gmem(CONSUMERS - 1 - w, wait_read_only=True)
            plan.dq_empty.arrive(refs.dq_empty, w)

    lax.fori_loop(0, walk.steps, store, None)
    plgpu.wait_smem_to_gmem(0)


def _consumer(plan: Plan, refs: Refs, work: Work, walk: Walk, wg) -> None:
    p, t = plan.problem, plan.tile
    plgpu.set_max_registers(t.registers, action="increase")
    plgpu.barrier_wait(refs.kv_full)

    def accumulate(dk_acc, dv_acc):
        step = functools.partial(_step, plan, refs, work, walk, wg, dk_acc, dv_acc)
        lax.fori_loop(0, walk.steps, step, None)
        return dk_acc[...], dv_acc[...]

    accumulators = (plgpu.ACC((64, tiles.padded(d)), jnp.float32) for d in (p.D, p.Dv))
    dk, dv = pl.run_scoped(accumulate, *accumulators)
    plan.meeting.meet(refs.meeting)  # the other consumer's last dQ still reads all of K
    dtype = jnp.dtype(p.dtype)
    refs.k_smem.write(0, (dk * p.scale).astype(dtype), rows=pl.ds(wg * 64, 64))
    refs.v_smem.write(0, dv.astype(dtype), rows=pl.ds(wg * 64, 64))
    plgpu.commit_smem()
    row = work.block * t.block_kv + wg * 64
    refs.k_smem.store(refs.dk_gmem, work.b, row, work.h, 0, rows=pl.ds(wg * 64, 64))
    refs.v_smem.store(refs.dv_gmem, work.b, row, work.h, 0, rows=pl.ds(wg * 64, 64))
    plgpu.wait_smem_to_gmem(0)


def _step(plan: Plan, refs: Refs, work: Work, walk: Walk, wg, dk_acc, dv_acc, step, _) -> None:
    """One query block: five products, ordered so that each runs under the arithmetic of another."""
    t = plan.tile
    slot, ds_slot = lax.rem(step, t.stages), lax.rem(step, t.ds_stages)
    mine = pl.ds(wg * 64, 64)
    plgpu.barrier_wait(refs.q_full.at[slot])
    form = functools.partial(_weights, plan, refs, work, walk, wg, step, slot)
    scores = plgpu.ACC((64, t.block_q), jnp.float32)
    weights, ds = pl.run_scoped(form, scores, scores)
    if refs.dq_gmem is None:
        tma.product(dv_acc, weights, refs.do_smem, slot)
        tma.product(dk_acc, ds, refs.q_smem, slot)
        barriers.fence(plan.interpret)  # the statistics have been read, and TMA refills their slot
    else:
        _three_products(plan, refs, wg, step, slot, ds_slot, mine, weights, ds, dk_acc, dv_acc)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(refs.q_do_empty.at[slot])


def _three_products(plan: Plan, refs: Refs, wg, step, slot, ds_slot, mine, weights, ds, dk_acc, dv_acc) -> None:
    """dV, dQ and dK, with the way of dS and of dQ through shared memory."""
    refs.ds_smem[ds_slot, mine] = ds
    tma.product(dv_acc, weights, refs.do_smem, slot)
    barriers.fence(plan.interpret)
    plan.meeting.meet(refs.meeting)

    def finish(dq_acc):
        _dq_product(plan, refs, wg, step, ds_slot, dq_acc)
        running = tma.product(dk_acc, ds, refs.q_smem, slot)
        dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=running)
        plan.dq_empty.wait(refs.dq_empty, wg)
        refs.dq_smem[wg] = register_order.to_memory(dq, plan.interpret)
        barriers.fence(plan.interpret)
        plan.dq_full.arrive(refs.dq_full, wg)

    pl.run_scoped(finish, plgpu.ACC(plan.dq_tile, jnp.float32))


def _weights(plan: Plan, refs: Refs, work: Work, walk: Walk, wg, step, slot, s_acc, dp_acc):
    """P^T and dS^T [64 keys, block_q] in the input dtype."""
    p, mine = plan.problem, pl.ds((wg + descriptors.zero_at(step, plan.interpret)) * 64, 64)
    tma.transposed_product(s_acc, refs.k_smem, 0, refs.q_smem, slot, rows=mine)
    lse2 = _compat.load(refs.lse_smem.at[slot], masking.COLUMNS)
    plgpu.barrier_wait(refs.do_full.at[slot])
    running = tma.transposed_product(dp_acc, refs.v_smem, 0, refs.do_smem, slot, rows=mine)
    products = plgpu.wgmma_accumulator_load(s_acc, wait_n=running)
    s, factor, slope = _modify(plan, refs, work, walk, wg, step, products)
    if refs.limits_smem is None:
        s = _hide(plan, work, walk, wg, step, s)
    else:
        s = _hide_by_limits(plan, refs, work, walk, wg, step, slot, s)
    if refs.kv_ids_smem is not None:
        key_ids = _compat.load(refs.kv_ids_smem.at[pl.ds(wg * 64, 64)], softmax.ROWS)
        s = masking.hide_other_segments(s, key_ids, _compat.load(refs.q_ids_smem.at[slot], masking.COLUMNS))
    weights = jnp.exp2(s * factor - over_rows(lse2, s.shape))
    rounded = weights.astype(p.dtype)
    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
    delta = _compat.load(refs.delta_smem.at[slot], masking.COLUMNS)
    ds = weights * (dp - over_rows(delta, dp.shape))
    return rounded, (ds if slope is None else ds * slope).astype(p.dtype)


def _modify(plan: Plan, refs: Refs, work: Work, walk: Walk, wg, step, products) -> scores.Scores:
    """Softcap and ALiBi on a tile of K Q^T."""
    p, t = plan.problem, plan.tile
    head, block = walk.at(step)
    slope = None if refs.slopes_gmem is None else refs.slopes_gmem[tma.batch_entry(refs.slopes_gmem, work.b), head]
    apart = work.block * t.block_kv + wg * 64 - (block * t.block_q + p.offset)
    return scores.modify(p, products, slope, apart, plan.interpret)


def _dq_product(plan: Plan, refs: Refs, wg, step, ds_slot, dq_acc) -> None:
    """This consumer's part of dQ / scale = dS K, over all the keys of the CTA."""
    rows, columns = plan.dq_tile
    zero = descriptors.zero_at(step, plan.interpret)
    if plan.tile.split_rows:
        ds = refs.ds_smem.at[ds_slot, :, pl.ds(wg * rows, rows)]
        k = refs.k_smem.columns(0, zero * columns, columns)
    else:
        ds = refs.ds_smem.at[ds_slot]
        k = refs.k_smem.columns(0, (wg + zero) * columns, columns)
    plgpu.wgmma(dq_acc, ds.transpose((1, 0)), k)


def _hide(plan: Plan, work: Work, walk: Walk, wg, step, s) -> jax.Array:
    """-inf where an edge of the mask, or the end of the keys, cuts a tile of S^T."""
    p, t = plan.problem, plan.tile
    ragged = p.Sk % t.block_kv != 0
    if p.left is None and p.right is None and not ragged:
        return s
    _, block = walk.at(step)
    cut = (block < walk.rows.full_lo) | (block >= walk.rows.full_hi)
    if ragged:
        cut = cut | (work.block == p.Sk // t.block_kv)

    def hide(s):
        key = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=softmax.ROWS) + (work.block * t.block_kv + wg * 64)
        here = key - (p.offset + block * t.block_q)  # the query at the key's own position, as a column
        last = t.block_q - 1
        high = softmax.row_values(last, 64, jnp.int32) if p.left is None else jnp.minimum(here + p.left, last)
        if ragged:
            high = jnp.where(key < p.Sk, high, -1)
        return masking.hide_columns(s, None if p.right is None else here - p.right, high, plan.interpret)

    return lax.cond(cut, hide, lambda s: s, s)


def _hide_by_limits(plan: Plan, refs: Refs, work: Work, walk: Walk, wg, step, slot, s) -> jax.Array:
    """-inf where a key is not in its query's own range."""
    _, block = walk.at(step)
    b = tma.batch_entry(refs.visits_gmem, work.b)
    full_lo, full_hi = (refs.visits_gmem[b, block, n] for n in (1, 2))

    def hide(s):
        key = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=softmax.ROWS)
        key = softmax.over_columns(key + (work.block * plan.tile.block_kv + wg * 64), s.shape)
        first = _compat.load(refs.limits_smem.at[slot, 0], masking.COLUMNS)
        s = jnp.where(key >= over_rows(first, s.shape), s, -jnp.inf)
        last = _compat.load(refs.limits_smem.at[slot, 1], masking.COLUMNS)
        return jnp.where(key <= over_rows(last, s.shape), s, -jnp.inf)

    return lax.cond((work.block < full_lo) | (work.block >= full_hi), hide, lambda s: s, s)


def over_rows(x: jax.Array, shape) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [1])

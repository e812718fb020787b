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
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, tiles
from pallas_kernels.parts import (
    barriers,
    bias,
    descriptors,
    dropping,
    key_rows,
    masking,
    query_rows,
    register_order,
    schedule,
    sparsity,
    tails,
    tma,
)
from pallas_kernels.parts.barriers import NamedBarrier
from pallas_kernels.parts.key_rows import Block, KeyRows, Walk, over_rows
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
    def block(self) -> Block:
        return Block(self.tile.block_kv, self.tile.block_q)

    @property
    def dq_tile(self) -> tuple[int, int]:
        """Rows and columns of a part of a dQ tile, as a consumer forms it."""
        columns = tiles.padded(self.problem.D)
        if self.tile.roles:
            return self.tile.block_q, 64
        if self.tile.split_rows:
            return self.tile.block_q // CONSUMERS, columns
        return self.tile.block_q, columns // CONSUMERS

    @property
    def dq_parts(self) -> int:
        return self.tile.block_q * tiles.padded(self.problem.D) // math.prod(self.dq_tile)

    @property
    def dq_shape(self) -> tuple[int, ...]:
        """The float32 buffer, part by part, in register order."""
        p = self.problem
        return (p.B, p.H, self.query_blocks, self.dq_parts, *register_order.memory_shape(*self.dq_tile))

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
    slopes_smem: Any = None  # of rows, see alibi
    q_ids_gmem: Any = None
    kv_ids_gmem: Any = None
    q_ids_smem: Any = None
    kv_ids_smem: Any = None
    limits_gmem: Any = None  # [B|1, 2, rows]: the first and the last key of each query
    limits_smem: Any = None
    visits_gmem: Any = None  # see ranges.table
    visitors_gmem: Any = None  # see ranges.visitors
    order_gmem: Any = None  # see ranges.longest_first
    listed_gmem: Any = None  # this and the next two: see sparsity
    bits_gmem: Any = None
    bits_smem: Any = None
    bias_gmem: Any = None
    d_bias_gmem: Any = None
    d_bias_smem: Any = None  # of the interpreter
    drop_gmem: Any = None  # [B, H, 2, rows], see dropping
    drop_smem: Any = None


def attention_backward(
    p: AttentionProblem, a: AttentionArrays, d_out, lse2, delta, dq, d_bias=None, *, interpret: _compat.Interpret = None
) -> tuple[jax.Array, jax.Array]:
    """Adds dQ / scale to the accumulator `dq` (see `Plan.dq_shape`) and returns dK and dV.

    d_bias: an accumulator for the gradient of the bias, see `bias.zeros`.

    Where the tile has dQ apart, `dq` is None, and dQ is left to `attention_backward_q`.
    lse2 = lse log2(e), float32 [B, H, Sq padded to whole blocks], +inf for rows without a gradient.
    delta = rowsum(dO O) - dlse, in the same shape.
    """
    plan = make_plan(p, interpret)
    q, d_out = (tma.fit(x, plan.tile.block_q) for x in (a.q, d_out))
    k, v = (tma.fit(x, plan.tile.block_kv) for x in (a.k, a.v))
    features = key_rows.inputs(p, a, plan.block)
    operands = {"q_gmem": q, "k_gmem": k, "v_gmem": v, "do_gmem": d_out}
    inputs = {
        **operands,
        "lse_gmem": lse2,
        "delta_gmem": delta,
        **tails.inputs(a, plan.tile.block_q, plan.tile.block_kv, **operands),
        **features,
        **key_rows.order(features),
        **{name: x for name, x in (("dq_gmem", dq), ("d_bias_gmem", d_bias)) if x is not None},
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


def make_plan(p: AttentionProblem, interpret: _compat.Interpret = None) -> Plan:
    tile = tiles.backward_tile(p)
    # Ascending blocks: the first keys have the longest walk.
    bytes_per_head = p.Sq * (2 * (p.D + p.Dv) + 4 * p.D) * p.group
    section = p.B if bias.is_shared(p) else 1
    if p.right is not None or p.key_ranges:
        section = max(section, schedule.section(p.B * p.Hk, 1, bytes_per_head, budget=40 * 2**20))
    order = Schedule(
        batch=p.B,
        heads=p.Hk,
        blocks=-(-p.Sk // tile.block_kv),
        section=section,
        across_batch=bias.is_shared(p),
    )
    return Plan(p, tile, order, tma.is_ragged(p), interpret)


def tile_types(plan: Plan) -> dict[str, tma.TileType]:
    p, t = plan.problem, plan.tile
    return {
        "q_smem": plan.tile_type(t.stages, t.block_q, p.D),
        "do_smem": plan.tile_type(t.stages, t.block_q, p.Dv),
        "k_smem": plan.tile_type(1, t.block_kv, p.D),
        "v_smem": plan.tile_type(1, t.block_kv, p.Dv),
    }


def _scratch(plan: Plan) -> dict[str, Any]:
    p, t = plan.problem, plan.tile
    types = tile_types(plan)
    smem = {name: x.scratch for name, x in types.items()}
    with_q, with_kv = key_rows.copies(p)
    dq_barriers = {}
    if not t.dq_apart:
        smem["ds_smem"] = plgpu.SMEM((t.ds_stages, t.block_kv, t.block_q), jnp.dtype(p.dtype), transforms=tma.TILED)
        smem["dq_smem"] = plgpu.SMEM((CONSUMERS, *plan.dq_shape[-2:]), jnp.float32)
        dq_barriers = {"dq_full": plan.dq_full.scratch, "dq_empty": plan.dq_empty.scratch}
    return {
        **smem,
        **key_rows.scratch(p, t.stages, plan.block, plan.interpret),
        "lse_smem": plgpu.SMEM((t.stages, t.block_q), jnp.float32),
        "delta_smem": plgpu.SMEM((t.stages, t.block_q), jnp.float32),
        "kv_full": plgpu.Barrier(num_arrivals=types["k_smem"].chunks + types["v_smem"].chunks + with_kv),
        "q_full": plgpu.Barrier(num_arrivals=types["q_smem"].chunks + 1 + with_q, num_barriers=t.stages),
        "q_do_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=t.stages),
        "do_full": plgpu.Barrier(num_arrivals=types["do_smem"].chunks + 1, num_barriers=t.stages),
        "meeting": plan.meeting.scratch,
        **dq_barriers,
    }


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    tiles_smem = {name: x.view(scratch[name]) for name, x in tile_types(plan).items()}
    refs = Refs(**tails.joined(dict(zip(names, gmem, strict=True))), **{**scratch, **tiles_smem})
    work = schedule.placed(plan.schedule.work(lax.axis_index("cta")), refs.order_gmem)
    walk = key_rows.walk(plan.problem, refs, work, plan.block)
    wg = lax.axis_index("wg")
    consume = functools.partial(_consumer, plan, refs, work, walk, wg)
    serve = functools.partial(_servants, plan, refs, work, walk, wg - CONSUMERS)
    lax.cond(wg < CONSUMERS, consume, serve)


def _servants(plan: Plan, refs: Refs, work: Work, walk: Walk, index) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    load = functools.partial(_loader, plan, refs, work, walk)
    store = functools.partial(store_dq, plan, refs, work, walk)
    barriers.in_warps([load] if refs.dq_gmem is None else [load, store], index, plan.interpret)


def _loader(plan: Plan, refs: Refs, work: Work, walk: Walk) -> None:
    t, refs = plan.tile, tails.of_entry(refs, work.b)
    row = work.block * t.block_kv
    refs.k_smem.load(refs.k_gmem, work.b, row, work.h, 0, refs.kv_full)
    refs.v_smem.load(refs.v_gmem, work.b, row, work.h, 0, refs.kv_full)
    key_rows.load_keys(refs, work.b, row, refs.kv_full, plan.block)

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
        key_rows.load(refs, work.b, row, slot, refs.q_full.at[slot], plan.block)
        query_rows.load_of_head(refs, work.b, head, row, slot, refs.q_full.at[slot])
        sparsity.load(refs, work.b, head, work.block, block, slot, refs.q_full.at[slot])

        refs.do_smem.load(refs.do_gmem, work.b, row, head, slot, refs.do_full.at[slot])
        plgpu.copy_gmem_to_smem(refs.delta_gmem.at[statistics], refs.delta_smem.at[slot], refs.do_full.at[slot])

    lax.fori_loop(0, walk.steps, load_block, None)


def store_dq(plan: Plan, refs: Refs, work: Work, walk: Walk) -> None:
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
    refs.v_smem.write(0, dropping.scaled(p, dv).astype(dtype), rows=pl.ds(wg * 64, 64))
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
        three_products(plan, refs, wg, step, slot, ds_slot, mine, weights, ds, dk_acc, dv_acc)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(refs.q_do_empty.at[slot])


def three_products(plan: Plan, refs: Refs, wg, step, slot, ds_slot, mine, weights, ds, dk_acc, dv_acc) -> None:
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
    ahead = key_rows.ahead(p, refs, work, walk, plan.block, wg, step, plan.interpret)
    lse2 = _compat.load(refs.lse_smem.at[slot], masking.COLUMNS)
    plgpu.barrier_wait(refs.do_full.at[slot])
    running = tma.transposed_product(dp_acc, refs.v_smem, 0, refs.do_smem, slot, rows=mine)
    products = plgpu.wgmma_accumulator_load(s_acc, wait_n=running)
    rows = KeyRows(work, walk, plan.block, wg * 64, *ahead)
    s, factor, slope = key_rows.scored(p, refs, rows, step, slot, products, plan.interpret)
    weights = jnp.exp2(s * factor - over_rows(lse2, s.shape))
    weights = dropping.of_columns(p, weights, dropping.read(refs, slot, masking.COLUMNS), rows.first, plan.interpret)
    rounded = dropping.kept(p, weights).astype(p.dtype)
    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
    delta = _compat.load(refs.delta_smem.at[slot], masking.COLUMNS)
    ds = dropping.score_gradient(p, weights, dp, over_rows(delta, dp.shape))
    key_rows.add_to_bias(p, refs, rows, step, wg, ds, plan.interpret)
    return rounded, (ds if slope is None else ds * slope).astype(p.dtype)


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

"""Backward for wide heads: that of `attention_backward`, where dK and dV are too much for one warpgroup.

    P = 2^(scale log2(e) Q K^T - lse2)    dV = P^T dO    dS = P (dO V^T - delta)    dK = scale dS^T Q    dQ = scale dS K

Who does what. A CTA owns 64 keys and walks over the query blocks. Both consumers work on the same tile of scores:
one forms S^T and P^T and keeps dV, the other forms dP^T and dS^T and keeps dK. P^T goes from the first to the second
through shared memory, so the second runs half a step behind and each one's products run under the other's
arithmetic. dS^T goes through shared memory too, and then each forms its share of dQ in slices of 64 columns, which it
adds to the float32 buffer straight from registers: staging it would be too much for the bandwidth of shared memory.
A tile with dQ apart leaves dQ to `attention_backward_q`, and dS^T stays in registers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, tiles
from pallas_kernels.hopper.attention_backward import CONSUMERS, Plan, make_plan, tile_types
from pallas_kernels.parts import (
    barriers,
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
from pallas_kernels.parts.key_rows import KeyRows, Walk, over_rows
from pallas_kernels.parts.schedule import Work
from pallas_kernels.problem import AttentionArrays, AttentionProblem

P_STAGES = 2


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
    p_smem: Any
    lse_smem: Any
    delta_smem: Any
    kv_full: Any
    q_full: Any
    q_empty: Any
    do_full: Any
    do_empty: Any
    p_full: Any
    p_empty: Any
    meeting: Any
    dq_gmem: Any = None  # this and the next three only where dQ is added here
    ds_smem: Any = None
    ds_full: Any = None
    ds_empty: Any = None
    dq_smem: Any = None  # of the interpreter, which cannot add from registers
    slopes_gmem: Any = None
    slopes_smem: Any = None  # of rows, see alibi
    q_ids_gmem: Any = None
    kv_ids_gmem: Any = None
    q_ids_smem: Any = None
    kv_ids_smem: Any = None
    limits_gmem: Any = None
    limits_smem: Any = None
    visits_gmem: Any = None
    visitors_gmem: Any = None
    order_gmem: Any = None  # see ranges.longest_first
    listed_gmem: Any = None  # this and the next two: see sparsity
    bits_gmem: Any = None
    bits_smem: Any = None
    bias_gmem: Any = None
    d_bias_gmem: Any = None
    d_bias_smem: Any = None  # of the interpreter
    slope_smem: Any = None  # of softcap, where the gradient of a bias wants dS without it
    drop_gmem: Any = None  # [B, H, 2, rows], see dropping
    drop_smem: Any = None


def attention_backward_roles(
    p: AttentionProblem, a: AttentionArrays, d_out, lse2, delta, dq, d_bias=None, *, interpret: _compat.Interpret = None
) -> tuple[jax.Array, jax.Array]:
    """Adds dQ / scale to the accumulator `dq` and returns dK and dV; all as `attention_backward` has it.

    d_bias: an accumulator for the gradient of the bias, see `bias.zeros`.
    dq: None where the tile has dQ apart.
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
        name="attention_backward_roles",
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch=_scratch(plan),
        grid=(plan.schedule.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(CONSUMERS, 1, interpret),
        interpret=interpret,
    )
    dk, dv = kernel(*inputs.values())
    return dk[:, : p.Sk, :, : p.D], dv[:, : p.Sk, :, : p.Dv]


def _scratch(plan: Plan) -> dict[str, Any]:
    p, t = plan.problem, plan.tile
    types = tile_types(plan)
    with_q, with_kv = key_rows.copies(p)
    scores = (t.block_kv, t.block_q)
    p_or_slope = plgpu.SMEM((P_STAGES, *scores), jnp.dtype(p.dtype), transforms=tma.TILED)
    of_dq = {}
    if not t.dq_apart:
        of_dq = {
            "ds_smem": plgpu.SMEM((t.ds_stages, *scores), jnp.dtype(p.dtype), transforms=tma.TILED),
            "ds_full": plgpu.Barrier(num_barriers=t.ds_stages),
            "ds_empty": plgpu.Barrier(num_barriers=t.ds_stages),
            **({"dq_smem": plgpu.SMEM((CONSUMERS, *plan.dq_shape[-2:]), jnp.float32)} if plan.interpret else {}),
        }
    return {
        **{name: x.scratch for name, x in types.items()},
        **key_rows.scratch(p, t.stages, plan.block, plan.interpret),
        **of_dq,
        **({"slope_smem": p_or_slope} if p.bias_gradient and p.softcap is not None else {}),
        "p_smem": p_or_slope,
        "lse_smem": plgpu.SMEM((t.stages, t.block_q), jnp.float32),
        "delta_smem": plgpu.SMEM((t.stages, t.block_q), jnp.float32),
        "kv_full": plgpu.Barrier(num_arrivals=types["k_smem"].chunks + types["v_smem"].chunks + with_kv),
        "q_full": plgpu.Barrier(num_arrivals=types["q_smem"].chunks + 1 + with_q, num_barriers=t.stages),
        "q_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=t.stages),
        "do_full": plgpu.Barrier(num_arrivals=types["do_smem"].chunks + 1, num_barriers=t.stages),
        "do_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=t.stages),
        "p_full": plgpu.Barrier(num_barriers=P_STAGES),
        "p_empty": plgpu.Barrier(num_barriers=P_STAGES),
        "meeting": plgpu.Barrier(num_arrivals=CONSUMERS),
    }


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    tiles_smem = {name: x.view(scratch[name]) for name, x in tile_types(plan).items()}
    refs = Refs(**tails.joined(dict(zip(names, gmem, strict=True))), **{**scratch, **tiles_smem})
    work = schedule.placed(plan.schedule.work(lax.axis_index("cta")), refs.order_gmem)
    walk = key_rows.walk(plan.problem, refs, work, plan.block)
    wg = lax.axis_index("wg")
    values = functools.partial(_value_consumer, plan, refs, work, walk)
    keys = functools.partial(_key_consumer, plan, refs, work, walk)
    produce = functools.partial(_producer, plan, refs, work, walk)
    lax.cond(wg < CONSUMERS, lambda: lax.cond(wg == 0, values, keys), produce)


def _producer(plan: Plan, refs: Refs, work: Work, walk: Walk) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    barriers.in_warps([functools.partial(_load, plan, refs, work, walk)], 0, plan.interpret)


def _load(plan: Plan, refs: Refs, work: Work, walk: Walk) -> None:
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
        pl.when(step >= t.stages)(lambda: plgpu.barrier_wait(refs.q_empty.at[slot]))
        refs.q_smem.load(refs.q_gmem, work.b, row, head, slot, refs.q_full.at[slot])
        plgpu.copy_gmem_to_smem(refs.lse_gmem.at[statistics], refs.lse_smem.at[slot], refs.q_full.at[slot])
        key_rows.load(refs, work.b, row, slot, refs.q_full.at[slot], plan.block)
        query_rows.load_of_head(refs, work.b, head, row, slot, refs.q_full.at[slot])
        sparsity.load(refs, work.b, head, work.block, block, slot, refs.q_full.at[slot])
        pl.when(step >= t.stages)(lambda: plgpu.barrier_wait(refs.do_empty.at[slot]))
        refs.do_smem.load(refs.do_gmem, work.b, row, head, slot, refs.do_full.at[slot])
        plgpu.copy_gmem_to_smem(refs.delta_gmem.at[statistics], refs.delta_smem.at[slot], refs.do_full.at[slot])

    lax.fori_loop(0, walk.steps, load_block, None)


def _value_consumer(plan: Plan, refs: Refs, work: Work, walk: Walk) -> None:
    """S^T, P^T, dV and the first columns of dQ."""
    p, t = plan.problem, plan.tile
    plgpu.set_max_registers(t.registers, action="increase")
    plgpu.barrier_wait(refs.kv_full)

    def accumulate(dv_acc):
        lax.fori_loop(0, walk.steps, functools.partial(_value_step, plan, refs, work, walk, dv_acc), None)
        _finish_products(plan)
        pl.when(walk.steps > 0)(finish)
        return dv_acc[...]

    def finish():
        last = walk.steps - 1
        _first_columns(plan, refs, work, walk, last)
        plgpu.barrier_arrive(refs.do_empty.at[lax.rem(last, t.stages)])

    dv = pl.run_scoped(accumulate, plgpu.ACC((64, tiles.padded(p.Dv)), jnp.float32))
    _meet(refs)
    _write(plan, refs.v_smem, refs.dv_gmem, work, dropping.scaled(p, dv))


def _value_step(plan: Plan, refs: Refs, work: Work, walk: Walk, dv_acc, step, _) -> None:
    t = plan.tile
    slot, p_slot = lax.rem(step, t.stages), lax.rem(step, P_STAGES)
    plgpu.barrier_wait(refs.q_full.at[slot])
    form = functools.partial(_weights, plan, refs, work, walk, step, slot)
    weights, marked, slope = pl.run_scoped(form, plgpu.ACC((64, t.block_q), jnp.float32))
    pl.when(step > 0)(lambda: plgpu.barrier_arrive(refs.do_empty.at[lax.rem(step - 1, t.stages)]))
    pl.when(step >= P_STAGES)(lambda: plgpu.barrier_wait(refs.p_empty.at[p_slot]))
    refs.p_smem[p_slot] = marked
    if slope is not None:
        refs.slope_smem[p_slot] = slope
    plgpu.barrier_arrive(refs.p_full.at[p_slot])
    plgpu.barrier_wait(refs.do_full.at[slot])
    tma.product(dv_acc, weights, refs.do_smem, slot)
    pl.when(step > 0)(lambda: _first_columns(plan, refs, work, walk, step - 1))


def _weights(plan: Plan, refs: Refs, work: Work, walk: Walk, step, slot, s_acc):
    """P^T that dropout leaves, P^T marked by it, and softcap's slope: None if there is none or the second has it.

    Each [64, block_q] in the input dtype.
    """
    p = plan.problem
    tma.transposed_product(s_acc, refs.k_smem, 0, refs.q_smem, slot)
    ahead = key_rows.ahead(p, refs, work, walk, plan.block, 0, step, plan.interpret)
    lse2 = _compat.load(refs.lse_smem.at[slot], masking.COLUMNS)
    products = plgpu.wgmma_accumulator_load(s_acc, wait_n=0)  # and dV of the step before is done
    rows = KeyRows(work, walk, plan.block, 0, *ahead)
    s, factor, slope = key_rows.scored(p, refs, rows, step, slot, products, plan.interpret)
    drop = dropping.read(refs, slot, masking.COLUMNS)
    barriers.fence(plan.interpret)  # the statistics have been read, and TMA refills their slot
    plgpu.barrier_arrive(refs.q_empty.at[slot])
    weights = jnp.exp2(s * factor - over_rows(lse2, s.shape))
    weights = dropping.of_columns(p, weights, drop, rows.first, plan.interpret)
    rounded = weights.astype(p.dtype)
    if slope is None:
        return dropping.kept(p, rounded), rounded, None
    if refs.slope_smem is not None:
        return dropping.kept(p, rounded), rounded, slope.astype(p.dtype)
    return dropping.kept(p, rounded), (weights * slope).astype(p.dtype), None


def _first_columns(plan: Plan, refs: Refs, work: Work, walk: Walk, step) -> None:
    """The share of dQ of the consumer of values: half of the slices, and the odd one."""
    if refs.dq_gmem is None:
        return
    ds_slot = lax.rem(step, plan.tile.ds_stages)
    plgpu.barrier_wait(refs.ds_full.at[ds_slot])
    _add_dq(plan, refs, work, walk, step, 0, range((plan.dq_parts + 1) // 2))
    plgpu.barrier_arrive(refs.ds_empty.at[ds_slot])


def _key_consumer(plan: Plan, refs: Refs, work: Work, walk: Walk) -> None:
    """dP^T, dS^T, dK and the last columns of dQ."""
    p, t = plan.problem, plan.tile
    plgpu.set_max_registers(t.registers, action="increase")
    plgpu.barrier_wait(refs.kv_full)

    def accumulate(dk_acc):
        lax.fori_loop(0, walk.steps, functools.partial(_key_step, plan, refs, work, walk, dk_acc), None)
        _finish_products(plan)
        pl.when(walk.steps > 0)(lambda: plgpu.barrier_arrive(refs.q_empty.at[lax.rem(walk.steps - 1, t.stages)]))
        return dk_acc[...]

    dk = pl.run_scoped(accumulate, plgpu.ACC((64, tiles.padded(p.D)), jnp.float32))
    _meet(refs)  # the other consumer's last dQ still reads K
    _write(plan, refs.k_smem, refs.dk_gmem, work, dk * p.scale)


def _key_step(plan: Plan, refs: Refs, work: Work, walk: Walk, dk_acc, step, _) -> None:
    t = plan.tile
    slot, ds_slot = lax.rem(step, t.stages), lax.rem(step, t.ds_stages)
    plgpu.barrier_wait(refs.do_full.at[slot])
    form = functools.partial(_ds, plan, refs, work, walk, step, slot)
    ds = pl.run_scoped(form, plgpu.ACC((64, t.block_q), jnp.float32))
    pl.when(step > 0)(lambda: plgpu.barrier_arrive(refs.q_empty.at[lax.rem(step - 1, t.stages)]))
    if refs.dq_gmem is not None:
        pl.when(step >= t.ds_stages)(lambda: plgpu.barrier_wait(refs.ds_empty.at[ds_slot]))
        refs.ds_smem[ds_slot] = ds
        barriers.fence(plan.interpret)
        plgpu.barrier_arrive(refs.ds_full.at[ds_slot])
    plgpu.barrier_wait(refs.q_full.at[slot])
    tma.product(dk_acc, ds, refs.q_smem, slot)
    if refs.dq_gmem is not None:
        plgpu.barrier_wait(refs.ds_full.at[ds_slot])  # all of this warpgroup have written
        _add_dq(plan, refs, work, walk, step, 1, range((plan.dq_parts + 1) // 2, plan.dq_parts))


def _ds(plan: Plan, refs: Refs, work: Work, walk: Walk, step, slot, dp_acc) -> jax.Array:
    """dS^T [64, block_q] in the input dtype."""
    p, p_slot = plan.problem, lax.rem(step, P_STAGES)
    tma.transposed_product(dp_acc, refs.v_smem, 0, refs.do_smem, slot)
    delta = _compat.load(refs.delta_smem.at[slot], masking.COLUMNS)
    plgpu.barrier_wait(refs.p_full.at[p_slot])
    weights = _compat.load(refs.p_smem.at[p_slot], plgpu.Layout.WGMMA)
    slope = None if refs.slope_smem is None else _compat.load(refs.slope_smem.at[p_slot], plgpu.Layout.WGMMA)
    plgpu.barrier_arrive(refs.p_empty.at[p_slot])
    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)  # and dK of the step before is done
    barriers.fence(plan.interpret)  # delta has been read, and TMA refills its slot
    plgpu.barrier_arrive(refs.do_empty.at[slot])
    ds = dropping.score_gradient(p, weights.astype(jnp.float32), dp, over_rows(delta, dp.shape))
    key_rows.add_to_bias(p, refs, KeyRows(work, walk, plan.block, 0), step, 0, ds, plan.interpret)
    return (ds if slope is None else ds * slope.astype(jnp.float32)).astype(p.dtype)


def _add_dq(plan: Plan, refs: Refs, work: Work, walk: Walk, step, wg: int, parts: range) -> None:
    """Adds some slices of dQ / scale = dS K."""
    head, block = walk.at(step)
    ds = refs.ds_smem.at[lax.rem(step, plan.tile.ds_stages)]

    for part in parts:

        def product(dq_acc, part=part):
            plgpu.wgmma(dq_acc, ds.transpose((1, 0)), refs.k_smem.columns(0, part * 64, 64))
            return plgpu.wgmma_accumulator_load(dq_acc, wait_n=0)

        dq = pl.run_scoped(product, plgpu.ACC(plan.dq_tile, jnp.float32))
        staging = None if refs.dq_smem is None else refs.dq_smem.at[wg]
        register_order.add(refs.dq_gmem.at[work.b, head, block, part], dq, staging, plan.interpret)


def _finish_products(plan: Plan) -> None:
    """Waits for the last product of a walk where no dQ has."""
    if plan.tile.dq_apart:
        plgpu.wgmma_wait(0)


def _meet(refs: Refs) -> None:
    plgpu.barrier_arrive(refs.meeting)
    plgpu.barrier_wait(refs.meeting)


def _write(plan: Plan, smem: tma.Tiles, gmem, work: Work, x: jax.Array) -> None:
    """Registers [64, head dim] -> the CTA's rows of dK or dV."""
    smem.write(0, x.astype(plan.problem.dtype))
    plgpu.commit_smem()
    smem.store(gmem, work.b, work.block * plan.tile.block_kv, work.h, 0)
    plgpu.wait_smem_to_gmem(0)

"""Backward of masked linear attention: dQ, dK and dV in one pass over the scores.

    dV = scale (Q K^T M)^T dO    dA = (dO V^T) M    dK = scale dA^T Q    dQ = scale dA K

`attention_backward` without a softmax: a CTA owns a block of keys, 64 rows for each of two consumer warpgroups, and
walks over the queries. It forms the transposed scores, so it wants the mask transposed: `ldmatrix` does that for 16
bits on the way to the registers, of a float32 mask a transposed copy is made first. There are no row statistics. dA
goes through shared memory, and dQ is added in float32 by TMA, as there.
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

from pallas_kernels import _compat, masked_tiles, tiles
from pallas_kernels.hopper import attention_backward
from pallas_kernels.hopper.attention_backward import CONSUMERS
from pallas_kernels.hopper.attention_dq import attention_dq
from pallas_kernels.masked_tiles import MaskedBackward
from pallas_kernels.parts import barriers, descriptors, schedule, shared_mask, tma
from pallas_kernels.parts.key_rows import Walk
from pallas_kernels.parts.ranges import Range
from pallas_kernels.parts.schedule import Schedule, Work
from pallas_kernels.parts.shared_mask import Sharing
from pallas_kernels.problem import AttentionProblem, LinearArrays, LinearProblem


@dataclasses.dataclass(frozen=True)
class Plan(attention_backward.Plan):
    """Everything static about one launch. `problem` is the softmax attention with the same arrays."""

    tile: MaskedBackward
    linear: LinearProblem
    sharing: Sharing
    mask_dtype: str

    @property
    def turned(self) -> bool:
        """Whether the mask is transposed in memory already."""
        return jnp.dtype(self.mask_dtype).itemsize != 2 or not _compat.TRANSPOSED_LOADS

    def tile_types(self) -> dict[str, tma.TileType]:
        t = self.tile
        shape = (t.block_kv, t.block_q) if self.turned else (t.block_q, t.block_kv)
        mask = shared_mask.tile_type(t.mask_stages, *shape, self.mask_dtype, self.interpret)
        return {**attention_backward.tile_types(self), "mask_smem": mask}


class Refs(NamedTuple):
    """What the kernel sees."""

    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    do_gmem: Any
    mask_gmem: Any  # [B|1, H|1, Sq, Sk], or turned
    dq_gmem: Any
    dk_gmem: Any
    dv_gmem: Any
    q_smem: Any
    do_smem: Any
    k_smem: Any
    v_smem: Any
    mask_smem: Any
    ds_smem: Any
    dq_smem: Any
    kv_full: Any
    q_full: Any
    do_full: Any
    q_do_empty: Any
    mask_full: Any
    mask_empty: Any
    meeting: Any
    dq_full: Any
    dq_empty: Any


def linear_masked_backward(
    p: LinearProblem, a: LinearArrays, d_out: jax.Array, *, interpret: _compat.Interpret = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dQ, dK and dV, one for each output head: [B, Sq or Sk, H, D or Dv]."""
    mask = shared_mask.in_memory(a.mask, p.dtype, 1, 1)
    plan = make_plan(p, mask.dtype, interpret)
    t, types = plan.tile, plan.tile_types()
    mask = jnp.swapaxes(mask, 2, 3) if plan.turned else mask
    mask = shared_mask.in_memory(mask, p.dtype, types["mask_smem"].rows, types["mask_smem"].columns)
    q, d_out = (tma.fit(x, t.block_q) for x in (a.q, d_out))
    k, v = (tma.fit(x, t.block_kv) for x in (a.k, a.v))
    kernel = _compat.kernel(
        functools.partial(_kernel, plan),
        name="linear_masked_backward",
        out_type=tuple(jax.ShapeDtypeStruct((p.B, x.shape[1], p.H, x.shape[3]), x.dtype) for x in (k, v)),
        scratch=_scratch(plan),
        grid=(plan.schedule.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(CONSUMERS, 2, interpret),
        interpret=interpret,
    )
    sums = _compat.accumulator(jnp.zeros(plan.dq_shape, jnp.float32))
    dk, dv = kernel(q, k, v, d_out, mask, sums)
    return attention_dq(plan, sums[...]), dk[:, : p.Sk, :, : p.D], dv[:, : p.Sk, :, : p.Dv]


def make_plan(p: LinearProblem, mask_dtype, interpret: _compat.Interpret = None) -> Plan:
    tile = masked_tiles.BACKWARD[tiles.padded(p.D), jnp.dtype(mask_dtype).itemsize]
    problem = AttentionProblem(p.target, p.dtype, B=p.B, H=p.H, Hk=p.H, Sq=p.Sq, Sk=p.Sk, D=p.D, Dv=p.Dv, scale=p.scale)
    shared = shared_mask.sharing(p)
    section = schedule.section(p.B * p.H, 1, p.Sq * (2 * (p.D + p.Dv) + 4 * p.D), budget=40 * 2**20)
    order = Schedule(
        batch=shared.masks,
        heads=shared.each,
        blocks=-(-p.Sk // tile.block_kv),
        section=section if shared_mask.is_reread(p, mask_dtype) else 1,
    )
    return Plan(problem, tile, order, tma.is_ragged(problem), interpret, p, shared, jnp.dtype(mask_dtype).name)


def _scratch(plan: Plan) -> dict[str, Any]:
    p, t, types = plan.problem, plan.tile, plan.tile_types()
    return {
        **{name: x.scratch for name, x in types.items()},
        "ds_smem": plgpu.SMEM((t.ds_stages, t.block_kv, t.block_q), jnp.dtype(p.dtype), transforms=tma.TILED),
        "dq_smem": plgpu.SMEM((CONSUMERS, *plan.dq_shape[-2:]), jnp.float32),
        "kv_full": plgpu.Barrier(num_arrivals=types["k_smem"].chunks + types["v_smem"].chunks),
        "q_full": plgpu.Barrier(num_arrivals=types["q_smem"].chunks, num_barriers=t.stages),
        "do_full": plgpu.Barrier(num_arrivals=types["do_smem"].chunks, num_barriers=t.stages),
        "q_do_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=t.stages),
        "mask_full": plgpu.Barrier(num_barriers=t.mask_stages),
        "mask_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=t.mask_stages),
        "meeting": plan.meeting.scratch,
        "dq_full": plan.dq_full.scratch,
        "dq_empty": plan.dq_empty.scratch,
    }


def _kernel(plan: Plan, *gmem, **scratch) -> None:
    views = {name: x.view(scratch[name]) for name, x in plan.tile_types().items()}
    refs = Refs(*gmem, **{**scratch, **views})
    place = plan.schedule.work(lax.axis_index("cta"))
    mask = plan.sharing.mask(place.b)
    b, h = plan.sharing.entry(place.b, place.h)
    work = Work(b, h, place.block)
    blocks = jnp.int32(plan.query_blocks)
    walk = Walk(Range(jnp.int32(0), jnp.int32(0), blocks, blocks), blocks, h, 1)
    wg = lax.axis_index("wg")
    consume = functools.partial(_consumer, plan, refs, work, wg)
    serve = functools.partial(_servants, plan, refs, work, mask, walk, wg - CONSUMERS)
    lax.cond(wg < CONSUMERS, consume, serve)


def _servants(plan: Plan, refs: Refs, work: Work, mask, walk: Walk, index) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    load = functools.partial(_load, plan, refs, work, mask)
    store = functools.partial(attention_backward.store_dq, plan, refs, work, walk)
    barriers.in_warps([load, store], index, plan.interpret)


def _load(plan: Plan, refs: Refs, work: Work, mask) -> None:
    t, first = plan.tile, work.block * plan.tile.block_kv
    head = functools.partial(shared_mask.operand_head, plan.linear, h=work.h)
    refs.k_smem.load(refs.k_gmem, work.b, first, head(refs.k_gmem), 0, refs.kv_full)
    refs.v_smem.load(refs.v_gmem, work.b, first, head(refs.v_gmem), 0, refs.kv_full)

    def load_block(step, _):
        slot, mask_slot, row = lax.rem(step, t.stages), lax.rem(step, t.mask_stages), step * t.block_q
        pl.when(step >= t.stages)(lambda: plgpu.barrier_wait(refs.q_do_empty.at[slot]))
        refs.q_smem.load(refs.q_gmem, work.b, row, head(refs.q_gmem), slot, refs.q_full.at[slot])
        refs.do_smem.load(refs.do_gmem, work.b, row, work.h, slot, refs.do_full.at[slot])
        pl.when(step >= t.mask_stages)(lambda: plgpu.barrier_wait(refs.mask_empty.at[mask_slot]))
        corner, full = (first, row) if plan.turned else (row, first), refs.mask_full.at[mask_slot]
        shared_mask.load(refs.mask_smem, refs.mask_gmem, mask, *corner, mask_slot, full)

    lax.fori_loop(0, plan.query_blocks, load_block, None)


def _consumer(plan: Plan, refs: Refs, work: Work, wg) -> None:
    p, t = plan.problem, plan.tile
    plgpu.set_max_registers(t.registers, action="increase")
    plgpu.barrier_wait(refs.kv_full)

    def accumulate(dk_acc, dv_acc):
        lax.fori_loop(0, plan.query_blocks, functools.partial(_step, plan, refs, wg, dk_acc, dv_acc), None)
        return dk_acc[...], dv_acc[...]

    sums = pl.run_scoped(accumulate, *(plgpu.ACC((64, tiles.padded(d)), jnp.float32) for d in (p.D, p.Dv)))
    plan.meeting.meet(refs.meeting)  # the other consumer's last dQ still reads all of K
    row, mine = work.block * t.block_kv + wg * 64, pl.ds(wg * 64, 64)
    targets = (refs.k_smem, refs.dk_gmem), (refs.v_smem, refs.dv_gmem)
    for (smem, _), total in zip(targets, sums, strict=True):
        smem.write(0, (total * p.scale).astype(p.dtype), rows=mine)
    plgpu.commit_smem()
    for smem, gmem in targets:
        smem.store(gmem, work.b, row, work.h, 0, rows=mine)
    plgpu.wait_smem_to_gmem(0)


def _step(plan: Plan, refs: Refs, wg, dk_acc, dv_acc, step, _) -> None:
    """One query block: five products, ordered so that each runs under the arithmetic of another."""
    t = plan.tile
    slot, ds_slot = lax.rem(step, t.stages), lax.rem(step, t.ds_stages)
    plgpu.barrier_wait(refs.q_full.at[slot])
    scores = plgpu.ACC((64, t.block_q), jnp.float32)
    weights, ds = pl.run_scoped(functools.partial(_factors, plan, refs, wg, step, slot), scores, scores)
    mine = pl.ds(wg * 64, 64)
    attention_backward.three_products(plan, refs, wg, step, slot, ds_slot, mine, weights, ds, dk_acc, dv_acc)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(refs.q_do_empty.at[slot])


def _factors(plan: Plan, refs: Refs, wg, step, slot, s_acc, dp_acc) -> tuple[jax.Array, jax.Array]:
    """(Q K^T M)^T and dA^T [64 keys, block_q] in the input dtype."""
    mine = pl.ds((wg + descriptors.zero_at(step, plan.interpret)) * 64, 64)
    tma.transposed_product(s_acc, refs.k_smem, 0, refs.q_smem, slot, rows=mine)
    plgpu.barrier_wait(refs.do_full.at[slot])
    running = tma.transposed_product(dp_acc, refs.v_smem, 0, refs.do_smem, slot, rows=mine)
    here = lax.rem(step, plan.tile.mask_stages)
    plgpu.barrier_wait(refs.mask_full.at[here])
    held = None if plan.tile.rereads else _mask(plan, refs, wg, here)
    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=running)
    weights = (s * (_mask(plan, refs, wg, here) if held is None else held)).astype(plan.problem.dtype)
    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
    ds = (dp * (_mask(plan, refs, wg, here) if held is None else held)).astype(plan.problem.dtype)
    barriers.fence(plan.interpret)  # the mask has been read, and TMA refills its slot
    plgpu.barrier_arrive(refs.mask_empty.at[here])
    return weights, ds


def _mask(plan: Plan, refs: Refs, wg, slot) -> jax.Array:
    """This consumer's keys of a tile of the transposed mask, in registers."""
    tile, mine = refs.mask_smem.multiplied, pl.ds(wg * 64, 64)
    tile = tile.at[slot, 0, mine] if plan.turned else tile.at[slot, 0, :, mine].transpose((1, 0))
    return _compat.load(tile, plgpu.Layout.WGMMA).astype(jnp.float32)

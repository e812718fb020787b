"""Backward of L1 attention, dK and dV: every key row, in one pass over the queries that see it.

    P = 2^(s log2(e) - lse2)    dS = P (dO V^T - delta)
    dV = P^T dO                 dK_jw = -scale sum_i dS_ij s'_ij sign(k_jw - q_iw)

with s' = 1 for s = -scale d and s^2 for the reciprocal. A consumer warpgroup has 64 keys of one head and walks over
the queries of every query head that reads them, with S and dO V^T the other way round. One warp of the last
warpgroup loads.
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
from pallas_kernels.hopper.l1_backward_q import make_schedule
from pallas_kernels.l1_tiles import L1BackwardTile
from pallas_kernels.parts import (
    barriers,
    key_rows,
    l1_scores,
    masking,
    split,
    tma,
)
from pallas_kernels.parts.key_rows import Block, KeyRows, Walk, over_rows
from pallas_kernels.parts.l1_rows import Rows, Sums
from pallas_kernels.parts.schedule import Schedule, Work
from pallas_kernels.problem import AttentionArrays, L1Problem

WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    problem: L1Problem
    tile: L1BackwardTile
    schedule: Schedule
    interpret: _compat.Interpret

    @property
    def parts(self) -> int:
        return l1_tiles.parts(self.problem)

    @property
    def block(self) -> Block:
        return Block(self.tile.rows, self.tile.block)

    @property
    def rows(self) -> Rows:
        """Keys stay, queries pass by."""
        return Rows(self.problem.D, self.tile, self.interpret)

    @property
    def v(self) -> tma.TileType:
        return self._values(self.tile.warpgroups, 64)

    @property
    def do(self) -> tma.TileType:
        return self._values(self.tile.stages, self.tile.block)

    def _values(self, count: int, rows: int) -> tma.TileType:
        p = self.problem
        dtype = jnp.bfloat16 if self.parts > 1 else jnp.dtype(p.dtype)
        return tma.TileType(count * self.parts, rows, tiles.padded(p.Dv), dtype, tma.is_ragged(p), self.interpret)


class Refs(NamedTuple):
    """What a kernel sees; a feature that was not asked for is None."""

    still_gmem: Any  # these are of l1_rows
    passing_gmem: Any
    v_gmem: Any
    do_gmem: Any
    lse_gmem: Any
    delta_gmem: Any
    dk_gmem: Any
    dv_gmem: Any
    still_smem: Any
    passing_smem: Any
    ds_smem: Any
    do_smem: Any
    v_smem: Any
    lse_smem: Any
    delta_smem: Any
    kv_full: Any
    q_full: Any
    q_empty: Any
    still_signs_gmem: Any = None
    still_sums_gmem: Any = None
    passing_signs_gmem: Any = None
    passing_sums_gmem: Any = None
    still_signs_smem: Any = None
    still_sums_smem: Any = None
    passing_signs_smem: Any = None
    passing_sums_smem: Any = None
    slopes_gmem: Any = None
    q_ids_gmem: Any = None
    kv_ids_gmem: Any = None
    q_ids_smem: Any = None
    kv_ids_smem: Any = None
    limits_gmem: Any = None
    limits_smem: Any = None
    visits_gmem: Any = None
    visitors_gmem: Any = None


def l1_backward_k(
    p: L1Problem,
    a: AttentionArrays,
    d_out,
    lse2,
    delta,
    *,
    tile: L1BackwardTile | None = None,
    interpret: _compat.Interpret = None,
) -> tuple[jax.Array, jax.Array]:
    """dK and dV in float32 [B, Sk, Hk, D] and [B, Sk, Hk, Dv]; lse2 and delta as `l1_backward_q` takes them."""
    t = tile or l1_tiles.backward_tile(p)
    plan = Plan(p, t, make_schedule(p, t.rows, p.Sk, p.Hk), interpret)
    rows = plan.rows.inputs(a.k, a.q)
    d_out, v = (split.in_memory(x, plan.parts) for x in (d_out, a.v))
    d_out, v = tma.fit(d_out, t.block), tma.fit(v, t.rows)
    tail = ((0, 0), (0, 0), (0, -p.Sq % t.block))
    inputs = {
        **rows,
        **{"v_gmem": v, "do_gmem": d_out},
        "lse_gmem": jnp.pad(lse2, tail, constant_values=jnp.inf),
        "delta_gmem": jnp.pad(delta, tail),
        **key_rows.inputs(p, a, plan.block),
    }
    kernel = _compat.kernel(
        functools.partial(_kernel, plan, (*inputs, "dk_gmem", "dv_gmem")),
        name="l1_backward_k",
        out_type=(
            plan.rows.out_type(rows),
            jax.ShapeDtypeStruct((p.B, *v.shape[1:]), jnp.float32),
        ),
        scratch=_scratch(plan),
        grid=(plan.schedule.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(t.warpgroups, 1, interpret),
        interpret=interpret,
    )
    dk, dv = kernel(*inputs.values())
    return dk[:, : p.Sk, :, : p.D], dv[:, : p.Sk, :, : p.Dv]


def _scratch(plan: Plan) -> dict[str, Any]:
    p, t = plan.problem, plan.tile
    with_q, with_k = key_rows.copies(p)
    still, passing = plan.rows.copies()
    of_keys = t.warpgroups * (still + plan.parts * plan.v.chunks) + with_k
    of_queries = passing + plan.parts * plan.do.chunks + 2 + with_q
    return {
        **plan.rows.scratch(),
        "v_smem": plan.v.scratch,
        "do_smem": plan.do.scratch,
        "lse_smem": plgpu.SMEM((t.stages, t.block), jnp.float32),
        "delta_smem": plgpu.SMEM((t.stages, t.block), jnp.float32),
        **key_rows.scratch(p, t.stages, plan.block),
        "kv_full": plgpu.Barrier(num_arrivals=of_keys),
        "q_full": plgpu.Barrier(num_arrivals=of_queries, num_barriers=t.stages),
        "q_empty": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.stages),
    }


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    for name, x in {"do_smem": plan.do, "v_smem": plan.v}.items():
        scratch[name] = x.view(scratch[name])
    refs = Refs(**dict(zip(names, gmem, strict=True)), **scratch)
    work = plan.schedule.work(lax.axis_index("cta"))
    walk = key_rows.walk(plan.problem, refs, work, plan.block)
    wg = lax.axis_index("wg")
    consume = functools.partial(_consumer, plan, refs, work, walk, wg)
    lax.cond(wg < plan.tile.warpgroups, consume, functools.partial(_producer, plan, refs, work, walk))


def _producer(plan: Plan, refs: Refs, work: Work, walk: Walk) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    barriers.in_warps([functools.partial(_load, plan, refs, work, walk)], 0, plan.interpret)


def _load(plan: Plan, refs: Refs, work: Work, walk: Walk) -> None:
    p, t = plan.problem, plan.tile
    for w in range(t.warpgroups):
        row = work.block * t.rows + w * 64
        plan.rows.load_still(refs, work.b, row, work.h, w, refs.kv_full)
        for n in range(plan.parts):
            refs.v_smem.load(refs.v_gmem, n * p.B + work.b, row, work.h, w * plan.parts + n, refs.kv_full)
    key_rows.load_keys(refs, work.b, work.block * t.rows, refs.kv_full, plan.block)

    def load_block(step, _):
        slot = lax.rem(step, t.stages)
        head, block = walk.at(step)
        row, full = block * t.block, refs.q_full.at[slot]
        pl.when(step >= t.stages)(lambda: plgpu.barrier_wait(refs.q_empty.at[slot]))
        plan.rows.load_passing(refs, work.b, row, head, slot, full)
        for n in range(plan.parts):
            refs.do_smem.load(refs.do_gmem, n * p.B + work.b, row, head, slot * plan.parts + n, full)
        for source, target in ((refs.lse_gmem, refs.lse_smem), (refs.delta_gmem, refs.delta_smem)):
            plgpu.copy_gmem_to_smem(source.at[work.b, head, pl.ds(row, t.block)], target.at[slot], full)
        key_rows.load(refs, work.b, row, slot, full, plan.block)

    lax.fori_loop(0, walk.steps, load_block, None)


class Carry(NamedTuple):
    dk: Sums
    dv: jax.Array  # [64, Dv]


def _consumer(plan: Plan, refs: Refs, work: Work, walk: Walk, wg) -> None:
    p, t = plan.problem, plan.tile
    plgpu.set_max_registers(t.registers, action="increase")
    plgpu.barrier_wait(refs.kv_full)
    dv = plgpu.layout_cast(jnp.zeros((64, tiles.padded(p.Dv)), jnp.float32), WGMMA)
    step = functools.partial(_step, plan, refs, work, walk, wg)
    carry = lax.fori_loop(0, walk.steps, step, Carry(plan.rows.start(), dv))
    plgpu.commit_smem()
    plan.rows.finish(refs, carry.dk, -p.scale, wg)
    plgpu.commit_smem()
    row = work.block * t.rows + wg * 64
    out, smem = plan.rows.out, plan.rows.out_smem(refs)
    out.store(smem, refs.dk_gmem, work.b, row, work.h, wg)
    width = out.chunks * out.chunk
    for first in range(0, carry.dv.shape[1], width):  # dV leaves through the same memory
        dv = carry.dv[:, first : first + width]
        plgpu.wait_smem_to_gmem(0)
        plgpu.commit_smem()
        out.write(smem, wg, dv, plan.interpret)
        plgpu.commit_smem()
        chunks = dv.shape[1] // out.chunk
        out.store(smem, refs.dv_gmem, work.b, row, work.h, wg, column=first, chunks=chunks)
    plgpu.wait_smem_to_gmem(0)


def _step(plan: Plan, refs: Refs, work: Work, walk: Walk, wg, step, carry: Carry) -> Carry:
    """Adds what a block of queries gives."""
    t = plan.tile
    slot = lax.rem(step, t.stages)
    plgpu.barrier_wait(refs.q_full.at[slot])
    form = functools.partial(_weights, plan, refs, work, walk, wg, step, slot)
    weights, ds = pl.run_scoped(form, plgpu.ACC((64, t.block), jnp.float32))
    weights = split.in_registers(weights, plan.parts, plan.do.dtype)

    def product(acc):
        for m, n in split.products(plan.parts):
            tma.product(acc, weights[m], refs.do_smem, slot * plan.parts + n)
        return acc[...]

    dv = carry.dv + pl.run_scoped(product, plgpu.ACC(carry.dv.shape, jnp.float32))
    dk = plan.rows.add(refs, carry.dk, ds, wg, slot)
    barriers.fence(plan.interpret)
    plgpu.barrier_arrive(refs.q_empty.at[slot])
    return Carry(dk, dv)


def _weights(plan: Plan, refs: Refs, work: Work, walk: Walk, wg, step, slot, dp_acc) -> tuple[jax.Array, jax.Array]:
    """P^T and dS^T s' [64, block]."""
    for m, n in split.products(plan.parts):
        left, right = wg * plan.parts + m, slot * plan.parts + n
        tma.transposed_product(dp_acc, refs.v_smem, left, refs.do_smem, right)
    negative = plan.rows.negative_distances(refs, wg, slot)
    s, unit, slope = l1_scores.of_distances(plan.problem, negative)
    rows = KeyRows(work, walk, plan.block, wg * 64)
    s, factor, _ = key_rows.scored(unit, refs, rows, step, slot, s, plan.interpret)
    lse2 = _compat.load(refs.lse_smem.at[slot], masking.COLUMNS)
    weights = jnp.exp2(s * factor - over_rows(lse2, s.shape))
    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
    delta = _compat.load(refs.delta_smem.at[slot], masking.COLUMNS)
    ds = weights * (dp - over_rows(delta, dp.shape))
    return weights, ds if slope is None else ds * slope

"""Backward of L1 attention, dQ: every query row, in one pass over its keys.

    P = 2^(s log2(e) - lse2)    dS = P (dO V^T - delta)    dQ_iw = -scale sum_j dS_ij s'_ij sign(q_iw - k_jw)

with s' = 1 for s = -scale d and s^2 for the reciprocal. A consumer warpgroup has 64 query rows of one head; while
the tensor cores form dO V^T it finds the distances, then dS, then what dS adds to dQ. One warp of the last
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
from pallas_kernels.l1_tiles import L1BackwardTile
from pallas_kernels.parts import (
    barriers,
    l1_scores,
    query_rows,
    schedule,
    softmax,
    split,
    tma,
)
from pallas_kernels.parts.l1_rows import Rows, Sums
from pallas_kernels.parts.query_rows import QueryRows
from pallas_kernels.parts.schedule import Schedule, Work
from pallas_kernels.problem import AttentionArrays, L1Problem


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
    def rows(self) -> Rows:
        """Queries stay, keys pass by."""
        return Rows(self.problem.D, self.tile, self.interpret)

    @property
    def do(self) -> tma.TileType:
        return self._values(self.tile.warpgroups, 64)

    @property
    def v(self) -> tma.TileType:
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
    dq_gmem: Any
    still_smem: Any
    passing_smem: Any
    ds_smem: Any
    do_smem: Any
    v_smem: Any
    statistics_smem: Any  # lse2 and delta of each consumer's rows
    q_full: Any
    kv_full: Any
    kv_empty: Any
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


def l1_backward_q(
    p: L1Problem,
    a: AttentionArrays,
    d_out,
    lse2,
    delta,
    *,
    tile: L1BackwardTile | None = None,
    interpret: _compat.Interpret = None,
) -> jax.Array:
    """dQ in float32 [B, Sq, H, D].

    lse2 = lse log2(e), float32 [B, H, Sq], +inf for rows without a gradient. delta = rowsum(dO O) - dlse, likewise.
    """
    t = tile or l1_tiles.backward_tile(p)
    plan = Plan(p, t, make_schedule(p, t.rows, p.Sq, p.H), interpret)
    rows = plan.rows.inputs(a.q, a.k)
    d_out, v = (split.in_memory(x, plan.parts) for x in (d_out, a.v))
    tail = ((0, 0), (0, 0), (0, plan.schedule.blocks * t.rows - p.Sq))
    inputs = {
        **rows,
        **{"v_gmem": tma.fit(v, t.block), "do_gmem": tma.fit(d_out, t.rows)},
        "lse_gmem": jnp.pad(lse2, tail, constant_values=jnp.inf),
        "delta_gmem": jnp.pad(delta, tail),
        **query_rows.inputs(p, a, t.rows, t.block),
    }
    kernel = _compat.kernel(
        functools.partial(_kernel, plan, (*inputs, "dq_gmem")),
        name="l1_backward_q",
        out_type=plan.rows.out_type(rows),
        scratch=_scratch(plan),
        grid=(plan.schedule.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(t.warpgroups, 1, interpret),
        interpret=interpret,
    )
    return kernel(*inputs.values())[:, : p.Sq, :, : p.D]


def make_schedule(p: L1Problem, rows: int, length: int, heads: int) -> Schedule:
    """Tiles of `rows` rows of a length, in heads."""
    masked = p.left is not None or p.right is not None
    section = schedule.section(p.B * heads, 1, 8 * p.Sk * (p.D + p.Dv)) if masked else 1
    return Schedule(p.B, heads, -(-length // rows), section, descending=masked and length == p.Sq)


def _scratch(plan: Plan) -> dict[str, Any]:
    p, t = plan.problem, plan.tile
    with_q, with_k = query_rows.copies(p)
    still, passing = plan.rows.copies()
    of_rows = still + plan.parts * plan.do.chunks + 2 + with_q
    of_keys = passing + plan.parts * plan.v.chunks + with_k
    return {
        **plan.rows.scratch(),
        "do_smem": plan.do.scratch,
        "v_smem": plan.v.scratch,
        "statistics_smem": plgpu.SMEM((t.warpgroups, 2, 64), jnp.float32),
        **query_rows.scratch(p, t.warpgroups, t.stages, t.block),
        "q_full": plgpu.Barrier(num_arrivals=t.warpgroups * of_rows),
        "kv_full": plgpu.Barrier(num_arrivals=of_keys, num_barriers=t.stages),
        "kv_empty": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.stages),
    }


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    for name, x in {"do_smem": plan.do, "v_smem": plan.v}.items():
        scratch[name] = x.view(scratch[name])
    refs = Refs(**dict(zip(names, gmem, strict=True)), **scratch)
    work = plan.schedule.work(lax.axis_index("cta"))
    keys = query_rows.key_blocks(plan.problem, refs, work, plan.tile.rows, plan.tile.block)
    wg = lax.axis_index("wg")
    consume = functools.partial(_consumer, plan, refs, work, keys, wg)
    lax.cond(wg < plan.tile.warpgroups, consume, functools.partial(_producer, plan, refs, work, keys))


def _producer(plan: Plan, refs: Refs, work: Work, keys) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    barriers.in_warps([functools.partial(_load, plan, refs, work, keys)], 0, plan.interpret)


def _load(plan: Plan, refs: Refs, work: Work, keys) -> None:
    p, t = plan.problem, plan.tile
    for w in range(t.warpgroups):
        row = work.block * t.rows + w * 64
        plan.rows.load_still(refs, work.b, row, work.h, w, refs.q_full)
        for n in range(plan.parts):
            refs.do_smem.load(refs.do_gmem, n * p.B + work.b, row, work.h, w * plan.parts + n, refs.q_full)
        for n, source in enumerate((refs.lse_gmem, refs.delta_gmem)):
            rows = source.at[work.b, work.h, pl.ds(row, 64)]
            plgpu.copy_gmem_to_smem(rows, refs.statistics_smem.at[w, n], refs.q_full)
        query_rows.load(refs, work.b, row, w, refs.q_full)
    kv_head = lax.div(work.h, jnp.int32(p.group))

    def load_block(step, _):
        slot = lax.rem(step, t.stages)
        row, full = (keys.lo + step) * t.block, refs.kv_full.at[slot]
        pl.when(step >= t.stages)(lambda: plgpu.barrier_wait(refs.kv_empty.at[slot]))
        plan.rows.load_passing(refs, work.b, row, kv_head, slot, full)
        for n in range(plan.parts):
            refs.v_smem.load(refs.v_gmem, n * p.B + work.b, row, kv_head, slot * plan.parts + n, full)
        query_rows.load_keys(refs, work.b, row, slot, full)

    lax.fori_loop(0, keys.hi - keys.lo, load_block, None)


def _consumer(plan: Plan, refs: Refs, work: Work, keys, wg) -> None:
    plgpu.set_max_registers(plan.tile.registers, action="increase")
    plgpu.barrier_wait(refs.q_full)
    row = work.block * plan.tile.rows + wg * 64
    rows = query_rows.read(refs, work, wg, row, keys)
    statistics = [_compat.load(refs.statistics_smem.at[wg, n], softmax.ROWS) for n in range(2)]
    step = functools.partial(_step, plan, refs, rows, wg, *statistics)
    sums = lax.fori_loop(0, keys.hi - keys.lo, step, plan.rows.start())
    plgpu.commit_smem()
    plan.rows.finish(refs, sums, -plan.problem.scale, wg)
    plgpu.commit_smem()
    plan.rows.out.store(plan.rows.out_smem(refs), refs.dq_gmem, work.b, row, work.h, wg)
    plgpu.wait_smem_to_gmem(0)


def _step(plan: Plan, refs: Refs, rows: QueryRows, wg, lse2, delta, step, sums: Sums) -> Sums:
    """Adds what a block of keys gives."""
    slot = lax.rem(step, plan.tile.stages)
    plgpu.barrier_wait(refs.kv_full.at[slot])
    form = functools.partial(_ds, plan, refs, rows, wg, lse2, delta, step, slot)
    ds = pl.run_scoped(form, plgpu.ACC((64, plan.tile.block), jnp.float32))
    sums = plan.rows.add(refs, sums, ds, wg, slot)
    barriers.fence(plan.interpret)
    plgpu.barrier_arrive(refs.kv_empty.at[slot])
    return sums


def _ds(plan: Plan, refs: Refs, rows: QueryRows, wg, lse2, delta, step, slot, dp_acc) -> jax.Array:
    """dS s' [64, block]."""
    for m, n in split.products(plan.parts):
        left, right = wg * plan.parts + m, slot * plan.parts + n
        tma.transposed_product(dp_acc, refs.do_smem, left, refs.v_smem, right)
    negative = plan.rows.negative_distances(refs, wg, slot)
    ids = query_rows.key_ids(refs, slot)
    s, unit, slope = l1_scores.of_distances(plan.problem, negative)
    s, factor, _ = query_rows.scored(unit, rows, rows.keys.lo + step, s, ids, plan.interpret)
    weights = jnp.exp2(s * factor - softmax.over_columns(lse2, s.shape))
    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
    ds = weights * (dp - softmax.over_columns(delta, dp.shape))
    return ds if slope is None else ds * slope

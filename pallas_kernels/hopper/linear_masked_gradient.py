"""The gradient of a mask: dM_ij = scale sum (q_i . k_j) (dO_i . v_j), over the batches and heads that share M.

Who does what. A CTA owns a tile of 128 x 128 of dM, 64 rows for each of two consumer warpgroups, and walks over the
entries that share M, with its sum in registers: no atomics, and the same bits every run. An entry is two products of
the same shape, so one ring serves both: a slot holds 128 rows of q with 128 of k, or of dO with v. No factor is used
twice, so reading L2 is the limit: CTAs with neighbouring rows make a cluster, and each brings half of k and v to both.
Where there are few tiles, entries are cut into parts that get sums of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, masked_tiles, tiles
from pallas_kernels.masked_tiles import MaskGradientTile
from pallas_kernels.parts import barriers, cluster, schedule, shared_mask, tma
from pallas_kernels.parts.schedule import SMS, Schedule, Work
from pallas_kernels.parts.shared_mask import Sharing
from pallas_kernels.problem import LinearArrays, LinearProblem

CONSUMERS = 2
BLOCK = 64 * CONSUMERS
_MOST_PARTS = 8
_SQUARE = 12  # row blocks that CTAs take side by side: with as many columns they fill the GPU


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    problem: LinearProblem
    tile: MaskGradientTile
    sharing: Sharing
    parts: int
    schedule: Schedule
    mask_dtype: str
    interpret: _compat.Interpret

    @property
    def sum_dtype(self) -> Any:
        """The mask's own if that has 16 bits and its sums are whole, else float32."""
        narrow = self.parts == 1 and self.mask_dtype in ("bfloat16", "float16")
        return jnp.dtype(self.mask_dtype if narrow else jnp.float32)

    @property
    def entries(self) -> int:
        """Of one sum."""
        return self.sharing.each // self.parts

    def tile_types(self) -> dict[str, tma.TileType]:
        p, n = self.problem, self.tile.stages
        rest = tiles.padded(p.D), jnp.dtype(p.dtype), tma.is_ragged(p), self.interpret
        found = {"row_smem": tma.TileType(n * CONSUMERS, 64, *rest), "column_smem": tma.TileType(n, BLOCK, *rest)}
        if self.sum_dtype.itemsize == 2:
            found["sum_smem"] = tma.TileType(CONSUMERS, 64, BLOCK, self.sum_dtype, False, self.interpret)
        return found


class Refs(NamedTuple):
    """What the kernel sees."""

    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    do_gmem: Any
    table_gmem: Any
    sum_gmem: Any  # [masks * parts, rows, 1, columns]
    row_smem: Any  # q or dO
    column_smem: Any  # k or v
    full: Any
    empty: Any
    sum_smem: Any = None  # of 16 bits, see `_write`


def linear_masked_gradient(
    p: LinearProblem, a: LinearArrays, d_out: jax.Array, *, interpret: _compat.Interpret = None
) -> jax.Array:
    """dM in the mask's shape and dtype."""
    plan = make_plan(p, a.mask.dtype, interpret)
    q, k, v, d_out = (tma.fit(x, BLOCK) for x in (a.q, a.k, a.v, d_out))
    blocks = plan.schedule.heads * plan.tile.cluster, plan.schedule.blocks
    shape = plan.schedule.batch, blocks[0] * BLOCK, 1, blocks[1] * BLOCK
    kernel = _compat.kernel(
        functools.partial(_kernel, plan),
        name="linear_masked_gradient",
        out_type=jax.ShapeDtypeStruct(shape, plan.sum_dtype),
        scratch=_scratch(plan),
        grid=(plan.schedule.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(CONSUMERS, 1, interpret),
        cluster=cluster.launch(plan.tile.cluster),
        interpret=interpret,
    )
    sums = kernel(q, k, v, d_out, plan.schedule.table(np.ones(plan.schedule.blocks)))
    sums = sums.reshape(plan.sharing.of_batch, plan.sharing.of_heads, plan.parts, shape[1], shape[3])
    total = sums[:, :, 0] if plan.parts == 1 else sums.sum(axis=2)
    return total[:, :, : p.Sq, : p.Sk].astype(a.mask.dtype)


def make_plan(p: LinearProblem, mask_dtype, interpret: _compat.Interpret = None) -> Plan:
    shared = shared_mask.sharing(p)
    rows, columns = -(-p.Sq // BLOCK), -(-p.Sk // BLOCK)
    parts = _parts(shared.masks * rows * columns, shared.each)
    tile = masked_tiles.GRADIENT[tiles.padded(p.D)]
    if rows % tile.cluster:
        tile = dataclasses.replace(tile, cluster=1)
    order = Schedule(
        batch=shared.masks * parts,
        heads=rows // tile.cluster,
        blocks=columns,
        section=schedule.section(shared.masks * parts * rows // tile.cluster, 1, tile.cluster, budget=_SQUARE),
        persistent=True,
        cluster=tile.cluster,
    )
    return Plan(p, tile, shared, parts, order, jnp.dtype(mask_dtype).name, interpret)


def _parts(count: int, entries: int) -> int:
    """Into how many sums the entries are cut: the fewest that are within a twentieth of the shortest time."""
    times = {n: -(-count * n // SMS) * (entries // n) for n in range(1, _MOST_PARTS + 1) if entries % n == 0}
    return next(n for n, time in times.items() if time <= 1.05 * min(times.values()))


def _scratch(plan: Plan) -> dict[str, Any]:
    t, types = plan.tile, plan.tile_types()
    return {
        **{name: x.scratch for name, x in types.items()},
        "full": plgpu.Barrier(num_arrivals=(CONSUMERS + 1) * types["row_smem"].chunks, num_barriers=t.stages),
        "empty": cluster.empty(t.cluster, CONSUMERS, t.stages),
    }


def _kernel(plan: Plan, *gmem, **scratch) -> None:
    views = {name: x.view(scratch[name]) for name, x in plan.tile_types().items()}
    refs = Refs(*gmem, **{**scratch, **views})
    cta, member, wg = lax.axis_index("cta"), cluster.member(plan.tile.cluster), lax.axis_index("wg")
    consume = functools.partial(_consumer, plan, refs, cta, member, wg)
    produce = functools.partial(_producer, plan, refs, cta, member)
    lax.cond(wg < CONSUMERS, consume, produce)


def _producer(plan: Plan, refs: Refs, cta, member) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    load = functools.partial(_load_tile, plan, refs, member)

    def role():
        done = schedule.for_each_tile(plan.schedule, refs.table_gmem, cta, load)
        cluster.leave(plan.tile.cluster, refs.empty, done, plan.tile.stages)

    barriers.in_warps([role], 0, plan.interpret)


def _load_tile(plan: Plan, refs: Refs, member, work: Work, done) -> jax.Array:
    """Copies the factors of a tile's entries; `done` counts the slots of earlier tiles."""
    t, p = plan.tile, plan.problem
    first, shared_along = _first_row(plan, work, member), cluster.axis(t.cluster)
    m, part = lax.div(work.b, jnp.int32(plan.parts)), lax.rem(work.b, jnp.int32(plan.parts))

    def load(n, rows_gmem, columns_gmem, b, h):
        slot = lax.rem(n, t.stages)
        full = refs.full.at[slot]
        pl.when(n >= t.stages)(lambda: plgpu.barrier_wait(refs.empty.at[slot]))
        row, head = first, shared_mask.operand_head(p, rows_gmem, h)
        for w in range(CONSUMERS):
            refs.row_smem.load(rows_gmem, b, row + w * 64, head, slot * CONSUMERS + w, full)
        head = shared_mask.operand_head(p, columns_gmem, h)
        refs.column_smem.load(columns_gmem, b, work.block * BLOCK, head, slot, full, cluster=shared_along)

    def load_entry(n, _):
        b, h = plan.sharing.entry(m, part * plan.entries + n)
        load(done + 2 * n, refs.q_gmem, refs.k_gmem, b, h)
        load(done + 2 * n + 1, refs.do_gmem, refs.v_gmem, b, h)

    lax.fori_loop(0, plan.entries, load_entry, None)
    return done + 2 * plan.entries


def _first_row(plan: Plan, work: Work, member):
    """Of the tile of a member of the cluster."""
    return (work.h * plan.tile.cluster + member) * BLOCK


def _consumer(plan: Plan, refs: Refs, cta, member, wg) -> None:
    plgpu.set_max_registers(plan.tile.registers, action="increase")
    add = functools.partial(_sum_tile, plan, refs, member, wg)
    schedule.for_each_tile(plan.schedule, refs.table_gmem, cta, add)
    plgpu.wait_smem_to_gmem(0)


def _sum_tile(plan: Plan, refs: Refs, member, wg, work: Work, done) -> jax.Array:
    """This consumer's rows of a tile of dM; returns the slots taken so far."""
    zero = plgpu.layout_cast(jnp.zeros((64, BLOCK), jnp.float32), plgpu.Layout.WGMMA)
    total = lax.fori_loop(0, plan.entries, functools.partial(_add_entry, plan, refs, wg, done), zero)
    row = _first_row(plan, work, member) + wg * 64
    _write(refs, wg, work, row, (total * plan.problem.scale).astype(plan.sum_dtype))
    return done + 2 * plan.entries


def _write(refs: Refs, wg, work: Work, row, total: jax.Array) -> None:
    """16 bits by TMA, for from registers they would be halves of sectors; of 32 bits whole ones, and no room beside."""
    column = work.block * BLOCK
    if refs.sum_smem is None:
        refs.sum_gmem[work.b, pl.ds(row, 64), 0, pl.ds(column, BLOCK)] = total
        return
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.sum_smem.write(wg, total)
    plgpu.commit_smem()
    refs.sum_smem.store(refs.sum_gmem, work.b, row, 0, wg, column=column)


def _add_entry(plan: Plan, refs: Refs, wg, done, n, total) -> jax.Array:
    stages = plan.tile.stages
    first, second = lax.rem(done + 2 * n, stages), lax.rem(done + 2 * n + 1, stages)

    def products(s_acc, dp_acc):
        plgpu.barrier_wait(refs.full.at[first])
        tma.transposed_product(s_acc, refs.row_smem, first * CONSUMERS + wg, refs.column_smem, first)
        plgpu.barrier_wait(refs.full.at[second])
        running = tma.transposed_product(dp_acc, refs.row_smem, second * CONSUMERS + wg, refs.column_smem, second)
        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=running)
        plgpu.barrier_arrive(refs.empty.at[first])
        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
        plgpu.barrier_arrive(refs.empty.at[second])
        return total + s * dp

    acc = plgpu.ACC((64, BLOCK), jnp.float32)
    return pl.run_scoped(products, acc, acc)

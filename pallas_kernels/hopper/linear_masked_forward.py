"""Masked linear attention: out_i = scale sum_j (q_i . k_j) M_ij v_j with any mask M, in one pass over the keys.

Who does what. A CTA takes 64 query rows for each of two consumer warpgroups, of one head, or of two heads that
share the mask: then each tile of the mask is read once for both. One warp of the last warpgroup, the producer,
copies Q once and then K, the mask and V block by block into rings. A consumer forms S of one block while the product
of the weights before with their V still runs; the mask is in registers by the time S is. Consumers take turns at
the tensor cores. All this is `attention_forward` without a softmax. Outputs leave through the memory of Q.

With the mask to read as well, L2 would be the limit: CTAs with neighbouring rows make a cluster, and each brings half
of K and V to both.
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
from pallas_kernels.masked_tiles import MaskedForward
from pallas_kernels.parts import barriers, cluster, schedule, shared_mask, tma
from pallas_kernels.parts.barriers import NamedBarrier
from pallas_kernels.parts.schedule import Schedule, Work
from pallas_kernels.parts.shared_mask import Sharing
from pallas_kernels.problem import LinearArrays, LinearProblem

WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    problem: LinearProblem
    tile: MaskedForward
    sharing: Sharing
    schedule: Schedule
    mask_dtype: str
    interpret: _compat.Interpret

    @property
    def turn(self) -> NamedBarrier:
        return barriers.turns(self.tile.warpgroups, self.interpret)

    @property
    def steps(self) -> int:
        return -(-self.problem.Sk // self.tile.block_kv)

    def entries(self, work: Work) -> list[tuple[jax.Array, jax.Array]]:
        """Batch and head of what a tile does together."""
        together = self.tile.together
        return [self.sharing.entry(work.b, work.h * together + g) for g in range(together)]

    def q_slot(self, done):
        """Where Q of the tile lies that begins after so many key blocks."""
        return lax.rem(lax.div(done, jnp.int32(self.steps)), jnp.int32(self.tile.q_stages))

    def q_tile(self, done, wg, g: int):
        """The tile of Q of a consumer and an entry."""
        return (self.q_slot(done) * self.tile.warpgroups + wg) * self.tile.together + g

    def first_row(self, work: Work, member):
        """Of the tile of a member of the cluster."""
        return (work.block * self.tile.cluster + member) * self.tile.rows

    def tile_types(self) -> dict[str, tma.TileType]:
        p, t = self.problem, self.tile
        shapes = {
            "q_smem": (t.q_stages * t.warpgroups * t.together, 64, p.D),
            "k_smem": (t.stages * t.together, t.block_kv, p.D),
            "v_smem": (t.stages * t.together, t.block_kv, p.Dv),
        }
        rest = jnp.dtype(p.dtype), tma.is_ragged(p), self.interpret
        return {
            **{name: tma.TileType(n, rows, tiles.padded(d), *rest) for name, (n, rows, d) in shapes.items()},
            "mask_smem": shared_mask.tile_type(t.mask_stages, t.rows, t.block_kv, self.mask_dtype, self.interpret),
        }


class Refs(NamedTuple):
    """What the kernel sees. Tile n * together + g of K and V belongs to the g-th entry."""

    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    mask_gmem: Any
    table_gmem: Any
    out_gmem: Any
    q_smem: Any
    k_smem: Any
    v_smem: Any
    mask_smem: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    mask_full: Any
    mask_empty: Any
    turn: Any


def linear_masked_forward(p: LinearProblem, a: LinearArrays, *, interpret: _compat.Interpret = None) -> jax.Array:
    """out [B, Sq, H, Dv] in the input dtype."""
    mask = shared_mask.in_memory(a.mask, p.dtype, 1, 1)
    plan = make_plan(p, mask.dtype, interpret)
    mask = shared_mask.in_memory(mask, p.dtype, plan.tile.rows, plan.tile.block_kv)
    q = tma.fit(a.q, plan.tile.rows)
    k, v = (tma.fit(x, plan.tile.block_kv) for x in (a.k, a.v))
    table = plan.schedule.table(np.ones(plan.schedule.blocks))
    kernel = _compat.kernel(
        functools.partial(_kernel, plan),
        name="linear_masked_forward",
        out_type=jax.ShapeDtypeStruct((p.B, q.shape[1], p.H, v.shape[3]), q.dtype),
        scratch=_scratch(plan),
        grid=(plan.schedule.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(plan.tile.warpgroups, 1, interpret),
        cluster=cluster.launch(plan.tile.cluster),
        interpret=interpret,
    )
    return kernel(q, k, v, mask, table)[:, : p.Sq, :, : p.Dv]


def make_plan(p: LinearProblem, mask_dtype, interpret: _compat.Interpret = None) -> Plan:
    tile = masked_tiles.FORWARD[tiles.padded(p.D), jnp.dtype(mask_dtype).itemsize]
    shared = shared_mask.sharing(p)
    if shared.each % tile.together:
        tile = dataclasses.replace(tile, together=1)
    groups, blocks = shared.each // tile.together, -(-p.Sq // tile.rows)
    if blocks % tile.cluster:
        tile = dataclasses.replace(tile, cluster=1)
    section = schedule.section(shared.masks * groups, 1, 2 * p.Sk * (p.D + p.Dv) * tile.together)
    order = Schedule(
        batch=shared.masks,
        heads=groups,
        blocks=blocks // tile.cluster,
        section=section if shared_mask.is_reread(p, mask_dtype) else 1,
        persistent=True,
        cluster=tile.cluster,
    )
    return Plan(p, tile, shared, order, jnp.dtype(mask_dtype).name, interpret)


def _scratch(plan: Plan) -> dict[str, Any]:
    t, types = plan.tile, plan.tile_types()
    return {
        **{name: x.scratch for name, x in types.items()},
        "q_full": plgpu.Barrier(
            num_arrivals=t.warpgroups * t.together * types["q_smem"].chunks, num_barriers=t.q_stages
        ),
        "q_empty": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.q_stages),
        "k_full": plgpu.Barrier(num_arrivals=t.together * types["k_smem"].chunks, num_barriers=t.stages),
        "k_empty": cluster.empty(t.cluster, t.warpgroups, t.stages),
        "v_full": plgpu.Barrier(num_arrivals=t.together * types["v_smem"].chunks, num_barriers=t.stages),
        "v_empty": cluster.empty(t.cluster, t.warpgroups, t.stages),
        "mask_full": plgpu.Barrier(num_barriers=t.mask_stages),
        "mask_empty": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.mask_stages),
        "turn": plan.turn.scratch,
    }


def _kernel(plan: Plan, *gmem, **scratch) -> None:
    views = {name: x.view(scratch[name]) for name, x in plan.tile_types().items()}
    refs = Refs(*gmem, **{**scratch, **views})
    cta, member, wg = lax.axis_index("cta"), cluster.member(plan.tile.cluster), lax.axis_index("wg")
    consume = functools.partial(_consumer, plan, refs, cta, member, wg)
    produce = functools.partial(_producer, plan, refs, cta, member)
    lax.cond(wg < plan.tile.warpgroups, consume, produce)


def _producer(plan: Plan, refs: Refs, cta, member) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    load = functools.partial(_load_tile, plan, refs, member)

    def role():
        done = schedule.for_each_tile(plan.schedule, refs.table_gmem, cta, load)
        for slots in (refs.k_empty, refs.v_empty):
            cluster.leave(plan.tile.cluster, slots, done, plan.tile.stages)

    barriers.in_warps([role], 0, plan.interpret)


def _load_tile(plan: Plan, refs: Refs, member, work: Work, done) -> jax.Array:
    """Copies the operands of a tile; `done` counts the key blocks of earlier tiles, which fix ring slots."""
    t, entries, first = plan.tile, plan.entries(work), plan.first_row(work, member)
    along = cluster.axis(t.cluster)
    q_slot = plan.q_slot(done)
    pl.when(done >= t.q_stages * plan.steps)(lambda: plgpu.barrier_wait(refs.q_empty.at[q_slot]))
    for w in range(t.warpgroups):
        row = first + w * 64
        for g, (b, h) in enumerate(entries):
            head = shared_mask.operand_head(plan.problem, refs.q_gmem, h)
            refs.q_smem.load(refs.q_gmem, b, row, head, plan.q_tile(done, w, g), refs.q_full.at[q_slot])

    def load(step, smem, gmem, full, empty):
        slot = lax.rem(done + step, t.stages)
        pl.when(done + step >= t.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        for g, (b, h) in enumerate(entries):
            head = shared_mask.operand_head(plan.problem, gmem, h)
            smem.load(gmem, b, step * t.block_kv, head, slot * t.together + g, full.at[slot], cluster=along)

    def load_keys(step):
        load(step, refs.k_smem, refs.k_gmem, refs.k_full, refs.k_empty)
        slot = lax.rem(done + step, t.mask_stages)
        pl.when(done + step >= t.mask_stages)(lambda: plgpu.barrier_wait(refs.mask_empty.at[slot]))
        index, corner = plan.sharing.mask(work.b), (first, step * t.block_kv)
        shared_mask.load(refs.mask_smem, refs.mask_gmem, index, *corner, slot, refs.mask_full.at[slot])

    def load_block(step, _):
        load_keys(step)
        load(step - 1, refs.v_smem, refs.v_gmem, refs.v_full, refs.v_empty)

    # Keys a step ahead of values, as the consumers take them: neither waits for room for the other.
    steps = plan.steps + work.block * 0  # no constant: the last block may reach past the end
    load_keys(0)
    lax.fori_loop(1, steps, load_block, None)
    load(steps - 1, refs.v_smem, refs.v_gmem, refs.v_full, refs.v_empty)
    return done + steps


def _consumer(plan: Plan, refs: Refs, cta, member, wg) -> None:
    plgpu.set_max_registers(plan.tile.registers, action="increase")
    if plan.tile.turns:
        pl.when(wg == 0)(lambda: plan.turn.arrive(refs.turn, 0))
    attend = functools.partial(_attend_tile, plan, refs, member, wg)
    schedule.for_each_tile(plan.schedule, refs.table_gmem, cta, attend)
    plgpu.wait_smem_to_gmem(0)


class Rows(NamedTuple):
    """The rows of one consumer, and how many key blocks earlier tiles took."""

    wg: jax.Array
    done: Any


class Carry(NamedTuple):
    """Between products: the weights of an entry's block wait for its V."""

    sums: tuple[jax.Array, ...]  # [64, Dv] for each entry
    weights: jax.Array  # [64, block_kv] in the input dtype


def _attend_tile(plan: Plan, refs: Refs, member, wg, work: Work, done) -> jax.Array:
    """Outputs of this consumer's 64 rows; returns the key blocks done so far."""
    early = plan.tile.q_stages == 1  # the next Q has no other place to come to
    rows = Rows(wg, done)
    plgpu.barrier_wait(refs.q_full.at[plan.q_slot(done)])

    def step(n, carry):
        mask = None
        for g in range(plan.tile.together):
            carry, mask = _advance(plan, refs, rows, n, g, carry, mask)
        return carry

    carry, mask = _first(plan, refs, rows)
    if not early:
        pl.when(done > 0)(lambda: _give_back(plan, refs, done - plan.steps))
    for g in range(1, plan.tile.together):
        carry, mask = _advance(plan, refs, rows, 0, g, carry, mask)
    carry = lax.fori_loop(1, plan.steps, step, carry)
    _write(plan, refs, rows, work, plan.first_row(work, member) + wg * 64, _last(plan, refs, rows, carry))
    if early:
        _give_back(plan, refs, done)
    return done + plan.steps


def _give_back(plan: Plan, refs: Refs, done) -> None:
    """Lets Q of another tile come where the outputs of this one have left."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(refs.q_empty.at[plan.q_slot(done)])


def _first(plan: Plan, refs: Refs, rows: Rows) -> tuple[Carry, jax.Array]:
    """The weights of the first entry's first block, and the mask there."""
    p, t = plan.problem, plan.tile
    slot = lax.rem(rows.done, t.stages)
    plgpu.barrier_wait(refs.k_full.at[slot])

    def product(s_acc):
        q_tile = plan.q_tile(rows.done, rows.wg, 0)
        tma.transposed_product(s_acc, refs.q_smem, q_tile, refs.k_smem, slot * t.together)
        mask = _mask(plan, refs, rows.wg, rows.done)
        return plgpu.wgmma_accumulator_load(s_acc, wait_n=0), mask

    s, mask = pl.run_scoped(product, plgpu.ACC((64, t.block_kv), jnp.float32))
    if t.together == 1:
        plgpu.barrier_arrive(refs.k_empty.at[slot])
    zero = plgpu.layout_cast(jnp.zeros((64, tiles.padded(p.Dv)), jnp.float32), WGMMA)
    return Carry((zero,) * t.together, _weights(plan, s, mask)), mask


def _advance(plan: Plan, refs: Refs, rows: Rows, step, g: int, carry: Carry, mask) -> tuple[Carry, jax.Array]:
    """S of entry g's block of a step on the tensor cores, and the product that is owed; the next weights while it runs.

    The mask comes in with the first entry.
    """
    t, wg, n = plan.tile, rows.wg, rows.done + step
    owed = g - 1 if g else t.together - 1  # whose weights wait
    slot, v_slot = lax.rem(n, t.stages), lax.rem(n if g else n - 1, t.stages)
    if g == 0:
        plgpu.barrier_wait(refs.k_full.at[slot])
    if t.turns:
        plan.turn.wait(refs.turn, wg)

    def overlapped(s_acc, o_acc):
        o_acc[...] = carry.sums[owed]
        q_tile = plan.q_tile(rows.done, wg, g)
        tma.transposed_product(s_acc, refs.q_smem, q_tile, refs.k_smem, slot * t.together + g)
        if owed == 0:
            plgpu.barrier_wait(refs.v_full.at[v_slot])
        running = tma.product(o_acc, carry.weights, refs.v_smem, v_slot * t.together + owed)
        if t.turns:
            plan.turn.arrive(refs.turn, barriers.following(wg, t.warpgroups))
        here = mask if g else _mask(plan, refs, wg, n)
        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=running)
        if g == t.together - 1:
            plgpu.barrier_arrive(refs.k_empty.at[slot])
        weights = _weights(plan, s, here)
        total = plgpu.wgmma_accumulator_load(o_acc, wait_n=0)
        if owed == t.together - 1:
            plgpu.barrier_arrive(refs.v_empty.at[v_slot])
        return Carry((*carry.sums[:owed], total, *carry.sums[owed + 1 :]), weights), here

    shapes = (64, t.block_kv), carry.sums[owed].shape
    return pl.run_scoped(overlapped, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def _last(plan: Plan, refs: Refs, rows: Rows, carry: Carry) -> tuple[jax.Array, ...]:
    """The product that is still owed."""
    t, owed = plan.tile, plan.tile.together - 1
    slot = lax.rem(rows.done + plan.steps - 1, t.stages)
    if owed == 0:
        plgpu.barrier_wait(refs.v_full.at[slot])

    def product(o_acc):
        o_acc[...] = carry.sums[owed]
        tma.product(o_acc, carry.weights, refs.v_smem, slot * t.together + owed)
        return o_acc[...]

    total = pl.run_scoped(product, plgpu.ACC(carry.sums[owed].shape, jnp.float32))
    plgpu.barrier_arrive(refs.v_empty.at[slot])
    return (*carry.sums[:owed], total)


def _mask(plan: Plan, refs: Refs, wg, n) -> jax.Array:
    """This consumer's rows of the mask of block n, in registers."""
    slot = lax.rem(n, plan.tile.mask_stages)
    plgpu.barrier_wait(refs.mask_full.at[slot])
    mask = _compat.load(refs.mask_smem.multiplied.at[slot, 0, pl.ds(wg * 64, 64)], WGMMA)
    barriers.fence(plan.interpret)
    plgpu.barrier_arrive(refs.mask_empty.at[slot])
    return mask


def _weights(plan: Plan, s: jax.Array, mask: jax.Array) -> jax.Array:
    return (s * mask.astype(jnp.float32)).astype(plan.problem.dtype)


def _write(plan: Plan, refs: Refs, rows: Rows, work: Work, row, sums: tuple[jax.Array, ...]) -> None:
    """Sums -> outputs from `row` on, through the memory of Q; the copy runs on."""
    p = plan.problem
    tiles_of = [plan.q_tile(rows.done, rows.wg, g) for g in range(len(sums))]
    for n, total in zip(tiles_of, sums, strict=True):
        refs.q_smem.write(n, (total * p.scale).astype(p.dtype))
    plgpu.commit_smem()
    for n, (b, h) in zip(tiles_of, plan.entries(work), strict=True):
        refs.q_smem.store(refs.out_gmem, b, row, h, n)

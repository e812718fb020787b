"""Forward: out = softmax(scale q k^T) v and lse, for every query row, in one pass over the keys.

Who does what. A CTA takes 64 query rows of one head for each consumer warpgroup. One warp of the last
warpgroup, the producer, copies Q once and then K and V block by block into rings of `stages` slots. A
consumer overlaps its own work: while the tensor cores form P(j-1) V(j-1), it turns S(j) into P(j). Consumers
also take turns at the tensor cores, so that one's softmax runs under another's products. (The two overlaps
are those of Shah et al., FlashAttention-3, arXiv 2407.08608.)

A CTA takes tile after tile. What the next one starts with arrives under the end of the one before: Q has a ring of
its own, of `q_stages` slots, and an output leaves through the slot of its Q.

Keys are walked from the last block to the first. A block that the causal edge, a window or the end of the
keys cuts takes a branch through the mask; any other jumps over it. (Three loops, one for each kind of block,
made ptxas serialize the wgmmas: C7513.)
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
from pallas_kernels.hopper.attention_forward_plan import Plan, Refs, make_plan, scratch
from pallas_kernels.parts import barriers, dropping, query_rows, ranges, schedule, softmax, sparsity, tails, tma
from pallas_kernels.parts.schedule import Work
from pallas_kernels.parts.softmax import Softmax
from pallas_kernels.problem import AttentionArrays, AttentionProblem

WGMMA = plgpu.Layout.WGMMA


def attention_forward(
    p: AttentionProblem, a: AttentionArrays, *, interpret: _compat.Interpret = None
) -> tuple[jax.Array, jax.Array]:
    """out [B, Sq, H, Dv] in the input dtype and lse [B, H, Sq] in float32."""
    plan = make_plan(p, interpret)
    q = tma.fit(a.q, plan.tile.rows)
    k, v = (tma.fit(x, plan.tile.block_kv) for x in (a.k, a.v))
    lse_rows = plan.schedule.blocks * plan.tile.rows
    inputs = {"q_gmem": q, "k_gmem": k, "v_gmem": v, "table_gmem": plan.table, **_features(plan, a)}
    kernel = _compat.kernel(
        functools.partial(_kernel, plan, (*inputs, "out_gmem", "lse_gmem")),
        name="attention_forward",
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype),
            jax.ShapeDtypeStruct((p.B, p.H, lse_rows), jnp.float32),
        ),
        scratch=scratch(plan),
        grid=(plan.schedule.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(plan.tile.warpgroups, 1, interpret),
        interpret=interpret,
    )
    out, lse = kernel(*inputs.values())
    return out[:, : p.Sq, :, : p.Dv], lse[:, :, : p.Sq]


def _features(plan: Plan, a: AttentionArrays) -> dict[str, jax.Array]:
    """What the call has beyond q, k and v, as the kernel wants it."""
    found = query_rows.inputs(plan.problem, a, plan.tile.rows, plan.tile.block_kv)
    found |= tails.inputs(a, plan.tile.rows, plan.tile.block_kv, v_gmem=a.v)
    if plan.has_places:
        found["places_gmem"] = ranges.places(found.pop("visits_gmem"))
    if a.sinks is not None:
        found["sinks_gmem"] = a.sinks.astype(jnp.float32) * softmax.LOG2E
    return {**found, **sparsity.order(found)}


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    scratch["out_smem"] = scratch["q_smem"]
    tiles_smem = {name: x.view(scratch[name]) for name, x in plan.tile_types.items()}
    refs = Refs(**tails.joined(dict(zip(names, gmem, strict=True))), **{**scratch, **tiles_smem})
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    consume = functools.partial(_consumer, plan, refs, cta, wg)
    produce = functools.partial(_producer, plan, refs, cta)
    lax.cond(wg < plan.tile.warpgroups, consume, produce)


def _tile(plan: Plan, refs: Refs, work: Work, place) -> tuple[Work, sparsity.Visits]:
    """The rows of a tile and their key blocks: at least one, wholly masked if need be, so no role has an empty case.

    place: where a plan that `has_places` has them written, else None.
    """
    t = plan.tile
    if place is None:
        work = schedule.placed(work, refs.order_gmem)
        keys = query_rows.key_blocks(plan.problem, refs, work, t.rows, t.block_kv)
    else:
        *keys, block = (place[n] for n in range(5))
        keys, work = ranges.Range(*keys), work._replace(block=block)
    last = jnp.minimum(keys.lo, -(-plan.problem.Sk // t.block_kv) - 1)
    keys = keys._replace(lo=last, hi=jnp.maximum(keys.hi, last + 1))
    return work, sparsity.visits(plan.problem, refs, work, keys, least=1)


class Done(NamedTuple):
    """What a CTA has behind it, which fixes the slots of the rings."""

    tiles: Any = 0
    blocks: Any = 0  # of keys


def _producer(plan: Plan, refs: Refs, cta) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    load = functools.partial(_load_tile, plan, refs)

    def role():
        schedule.for_each_tile(plan.schedule, refs.table_gmem, cta, load, Done())

    barriers.in_warps([role], 0, plan.interpret)


def _load_tile(plan: Plan, refs: Refs, work: Work, done: Done) -> Done:
    """Copies the operands of a tile."""
    t = plan.tile
    place = None
    if plan.has_places:
        place = refs.places_gmem.at[tma.batch_entry(refs.places_gmem, work.b), work.block]
    work, visits = _tile(plan, refs, work, place)
    refs = tails.of_entry(refs, work.b)
    kv_head = lax.div(work.h, jnp.int32(plan.problem.group))

    q_slot = lax.rem(done.tiles, t.q_stages)
    q_full = refs.q_full.at[q_slot]
    pl.when(done.tiles >= t.q_stages)(lambda: plgpu.barrier_wait(refs.q_empty.at[q_slot]))
    if place is not None:
        plgpu.copy_gmem_to_smem(place, refs.places_smem.at[q_slot], q_full)
    for w in range(t.warpgroups):
        row, n = work.block * t.rows + w * 64, q_slot * t.warpgroups + w
        refs.q_smem.load(refs.q_gmem, work.b, row, work.h, n, q_full)
        query_rows.load(refs, work.b, row, n, q_full)
        query_rows.load_of_head(refs, work.b, work.h, row, n, q_full)

    def load(step, smem, gmem, full, empty):
        slot = lax.rem(done.blocks + step, t.stages)
        pl.when(done.blocks + step >= t.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
        block, _ = visits.at(step)
        smem.load(gmem, work.b, block * t.block_kv, kv_head, slot, full.at[slot])
        return slot, block

    def load_keys(step):
        slot, block = load(step, refs.k_smem, refs.k_gmem, refs.k_full, refs.k_empty)
        query_rows.load_keys(refs, work.b, block * t.block_kv, slot, refs.k_full.at[slot])
        sparsity.load(refs, work.b, work.h, work.block, block, slot, refs.k_full.at[slot])

    def load_values(step):
        load(step, refs.v_smem, refs.v_gmem, refs.v_full, refs.v_empty)

    def load_block(step, _):
        load_keys(step)
        load_values(step - 1)

    # Keys a step ahead of values, as the consumers take them: neither waits for room for the other.
    load_keys(0)
    lax.fori_loop(1, visits.steps, load_block, None)
    load_values(visits.steps - 1)
    return Done(done.tiles + 1, done.blocks + visits.steps)


def _consumer(plan: Plan, refs: Refs, cta, wg) -> None:
    plgpu.set_max_registers(plan.tile.registers, action="increase")
    if plan.takes_turns:
        pl.when(wg == 0)(lambda: plan.turn.arrive(refs.turn, 0))
    attend = functools.partial(_attend_tile, plan, refs, wg)
    schedule.for_each_tile(plan.schedule, refs.table_gmem, cta, attend, Done())
    plgpu.wait_smem_to_gmem(0)


def _attend_tile(plan: Plan, refs: Refs, wg, work: Work, done: Done) -> Done:
    """Attention of this consumer's 64 rows."""
    t = plan.tile
    q_slot = lax.rem(done.tiles, t.q_stages)
    plgpu.barrier_wait(refs.q_full.at[q_slot])
    work, visits = _tile(plan, refs, work, refs.places_smem.at[q_slot] if plan.has_places else None)
    n = q_slot * t.warpgroups + wg
    queries = query_rows.read(refs, work, n, work.block * t.rows + wg * 64, visits.range)
    drop = dropping.read_rows(refs, n)
    rows = Rows(wg, n, work, done.blocks, query_rows.start(refs, work), queries, visits, drop)
    carry = _first(plan, refs, rows)
    if t.q_stages > 1:
        pl.when(done.tiles > 0)(functools.partial(_release_queries, refs, lax.rem(done.tiles - 1, t.q_stages)))
    carry = lax.fori_loop(1, visits.steps, functools.partial(_step, plan, refs, rows), carry)
    acc = _last(plan, refs, done.blocks + visits.steps - 1, carry)
    _epilogue(plan, refs, rows, acc, carry.state)
    if t.q_stages == 1:
        _release_queries(refs, 0)
    return Done(done.tiles + 1, done.blocks + visits.steps)


def _release_queries(refs: Refs, slot) -> None:
    """Gives the room of Q back, through which an output may still be on its way."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(refs.q_empty.at[slot])


class Rows(NamedTuple):
    """The query rows of one consumer, and how many key blocks earlier tiles took."""

    wg: jax.Array
    n: jax.Array  # of their tile in shared memory
    work: Work
    done: Any
    start: Softmax  # before any key
    queries: query_rows.QueryRows
    visits: sparsity.Visits
    drop: Any  # the keys of dropout


class Carry(NamedTuple):
    """Between steps: P of the last block waits for its V."""

    acc: jax.Array  # [64, Dv]
    weights: jax.Array  # [64, block_kv] in the input dtype
    state: Softmax


def _first(plan: Plan, refs: Refs, rows: Rows) -> Carry:
    """S and P of the first block; it is the one that can be cut by the edges."""
    p, t = plan.problem, plan.tile
    slot = lax.rem(rows.done, t.stages)
    plgpu.barrier_wait(refs.k_full.at[slot])

    def product(s_acc):
        tma.transposed_product(s_acc, refs.q_smem, rows.n, refs.k_smem, slot)
        return s_acc[...]

    s = pl.run_scoped(product, plgpu.ACC((64, t.block_kv), jnp.float32))
    keys = query_rows.key_block(refs, rows, 0, slot, t.block_kv, plan.interpret)
    state, weights, _ = _softmax(plan, refs, rows, keys, rows.start, s)
    acc = plgpu.layout_cast(jnp.zeros((64, tiles.padded(p.Dv)), jnp.float32), WGMMA)
    return Carry(acc, weights, state)


def _step(plan: Plan, refs: Refs, rows: Rows, step, carry: Carry) -> Carry:
    """S(step) and P(step-1) V(step-1) on the tensor cores; P(step) while the second still runs."""
    t = plan.tile
    k_slot, v_slot = lax.rem(rows.done + step, t.stages), lax.rem(rows.done + step - 1, t.stages)
    plgpu.barrier_wait(refs.k_full.at[k_slot])
    if plan.takes_turns:
        plan.turn.wait(refs.turn, rows.wg)

    def overlapped(s_acc, o_acc):
        o_acc[...] = carry.acc
        tma.transposed_product(s_acc, refs.q_smem, rows.n, refs.k_smem, k_slot)
        plgpu.barrier_wait(refs.v_full.at[v_slot])
        running = tma.product(o_acc, carry.weights, refs.v_smem, v_slot)
        if plan.takes_turns:
            plan.turn.arrive(refs.turn, barriers.following(rows.wg, t.warpgroups))
        keys = query_rows.key_block(refs, rows, step, k_slot, t.block_kv, plan.interpret)
        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=running)
        state, weights, fade = _softmax(plan, refs, rows, keys, carry.state, s)
        if t.pinned:
            barriers.pin(step, rows.visits.steps, plan.interpret)
        acc = plgpu.wgmma_accumulator_load(o_acc, wait_n=0)
        plgpu.barrier_arrive(refs.v_empty.at[v_slot])
        return Carry(softmax.faded(acc, fade, t.lazy, plan.interpret), weights, state)

    return pl.run_scoped(overlapped, plgpu.ACC((64, t.block_kv), jnp.float32), plgpu.ACC(carry.acc.shape, jnp.float32))


def _last(plan: Plan, refs: Refs, step, carry: Carry) -> jax.Array:
    """The product that is still owed."""
    slot = lax.rem(step, plan.tile.stages)
    plgpu.barrier_wait(refs.v_full.at[slot])

    def product(o_acc):
        o_acc[...] = carry.acc
        tma.product(o_acc, carry.weights, refs.v_smem, slot)
        return o_acc[...]

    acc = pl.run_scoped(product, plgpu.ACC(carry.acc.shape, jnp.float32))
    plgpu.barrier_arrive(refs.v_empty.at[slot])
    return acc


def _softmax(plan: Plan, refs: Refs, rows: Rows, keys: query_rows.KeyBlock, state: Softmax, products):
    """Takes a tile of q k^T into the running softmax, and gives the room of its keys back."""
    p, t = plan.problem, plan.tile
    release = functools.partial(plgpu.barrier_arrive, refs.k_empty.at[keys.slot])
    s, factor, _ = query_rows.from_slot(p, refs, rows.queries, rows.wg, keys, products, plan.interpret, release)
    guarded = not query_rows.sees_all(p, t.block_kv)
    state, weights, fade = softmax.step(state, s, factor, guarded, t.lazy)
    weights = dropping.of_rows(p, weights, rows.drop, keys.number * t.block_kv, plan.interpret)
    return state, dropping.kept(p, weights).astype(p.dtype), fade


def _epilogue(plan: Plan, refs: Refs, rows: Rows, acc, state: Softmax) -> None:
    """Divides and writes out; the copy runs on under the next tile."""
    work, row = rows.work, rows.queries.first
    inverse, lse = softmax.finish(state)
    out = acc * softmax.over_columns(dropping.scaled(plan.problem, inverse), acc.shape)
    refs.out_smem.write(rows.n, out.astype(plan.problem.dtype))
    refs.lse_smem[rows.wg] = lse
    plgpu.commit_smem()
    refs.out_smem.store(refs.out_gmem, work.b, row, work.h, rows.n)
    plgpu.copy_smem_to_gmem(refs.lse_smem.at[rows.wg], refs.lse_gmem.at[work.b, work.h, pl.ds(row, 64)])

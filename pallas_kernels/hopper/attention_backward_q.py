"""dQ alone, the same bits every run: each query row has one owner, which sums over the keys in their order.

    P = 2^(scale log2(e) Q K^T - lse2)    dS = P (dO V^T - delta)    dQ = scale dS K

`attention_backward` adds dQ from many CTAs, in whatever order they come. For `deterministic=True`, and for wide heads
where it is faster too, it leaves dQ out, and this kernel walks like the forward one: a CTA keeps 64 query rows for
each of two consumer warpgroups, a warp brings blocks of keys and values. Two products are done twice, so the whole
costs 7 / 5. At head dim 256 shared memory holds one block of values beside two of keys; values are done with first,
so they come and go on their own.
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
from pallas_kernels.parts import barriers, bias, descriptors, dropping, query_rows, softmax, sparsity, tails, tma
from pallas_kernels.parts.query_rows import QueryRows
from pallas_kernels.parts.schedule import Schedule, Work
from pallas_kernels.parts.sparsity import Visits
from pallas_kernels.problem import AttentionArrays, AttentionProblem
from pallas_kernels.tiles import QueryGradientTile

CONSUMERS = 2
ROWS = 64 * CONSUMERS
BLOCK_KV = 64
REGISTERS, PRODUCER_REGISTERS = 240, 24


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    problem: AttentionProblem
    tile: QueryGradientTile
    schedule: Schedule
    any_row: bool
    interpret: _compat.Interpret

    @property
    def apart(self) -> bool:
        """Whether values have barriers of their own, for there is one block of them."""
        return self.tile.v_stages == 1

    def tile_types(self) -> dict[str, tma.TileType]:
        p, t = self.problem, self.tile
        shapes = {
            "q_smem": (CONSUMERS, 64, p.D),
            "do_smem": (CONSUMERS, 64, p.Dv),
            "k_smem": (t.stages, BLOCK_KV, p.D),
            "v_smem": (t.v_stages, BLOCK_KV, p.Dv),
        }
        rest = jnp.dtype(p.dtype), self.any_row, self.interpret
        return {name: tma.TileType(n, rows, tiles.padded(d), *rest) for name, (n, rows, d) in shapes.items()}


class Refs(NamedTuple):
    """What the kernel sees; a feature that was not asked for is None."""

    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    do_gmem: Any
    lse_gmem: Any
    delta_gmem: Any
    dq_gmem: Any
    q_smem: Any
    do_smem: Any
    k_smem: Any
    v_smem: Any
    statistics_smem: Any  # lse2 and delta of each consumer's rows
    q_full: Any
    kv_full: Any
    kv_empty: Any
    v_full: Any = None  # this and the next where values are apart, else None
    v_empty: Any = None
    slopes_gmem: Any = None
    slopes_smem: Any = None  # of rows, see alibi
    q_ids_gmem: Any = None
    kv_ids_gmem: Any = None
    q_ids_smem: Any = None
    kv_ids_smem: Any = None
    limits_gmem: Any = None
    limits_smem: Any = None
    visits_gmem: Any = None
    listed_gmem: Any = None
    bits_gmem: Any = None
    bits_smem: Any = None
    bias_gmem: Any = None
    drop_gmem: Any = None
    drop_smem: Any = None


def attention_backward_q(
    p: AttentionProblem, a: AttentionArrays, d_out, lse2, delta, *, interpret: _compat.Interpret = None
) -> jax.Array:
    """dQ [B, Sq, H, D]; lse2 and delta as `attention_backward` takes them."""
    order = Schedule(
        batch=p.B,
        heads=p.H,
        blocks=-(-p.Sq // ROWS),
        section=p.B if bias.is_shared(p) else p.group,
        descending=p.right is not None,
        across_batch=bias.is_shared(p),
    )
    plan = Plan(p, tiles.query_gradient_tile(p), order, tma.is_ragged(p), interpret)
    q, d_out = (tma.fit(x, ROWS) for x in (a.q, d_out))
    k, v = (tma.fit(x, BLOCK_KV) for x in (a.k, a.v))
    lse2, delta = (_rows_of_tiles(plan, x, fill) for x, fill in ((lse2, jnp.inf), (delta, 0.0)))
    operands = {"q_gmem": q, "k_gmem": k, "v_gmem": v, "do_gmem": d_out}
    inputs = {
        **operands,
        "lse_gmem": lse2,
        "delta_gmem": delta,
        **tails.inputs(a, 64, BLOCK_KV, **operands),
        **query_rows.inputs(p, a, ROWS, BLOCK_KV),
    }
    kernel = _compat.kernel(
        functools.partial(_kernel, plan, (*inputs, "dq_gmem")),
        name="attention_backward_q",
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=_scratch(plan),
        grid=(plan.schedule.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(CONSUMERS, 1, interpret),
        interpret=interpret,
    )
    return kernel(*inputs.values())[:, : p.Sq, :, : p.D]


def _rows_of_tiles(plan: Plan, x: jax.Array, fill: float) -> jax.Array:
    """Statistics [B, H, rows] for the rows of whole tiles."""
    rows = plan.schedule.blocks * ROWS
    x = x[:, :, :rows]
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2])), constant_values=fill)


def _scratch(plan: Plan) -> dict[str, Any]:
    types, stages = plan.tile_types(), plan.tile.stages
    with_q, with_k = query_rows.copies(plan.problem)
    of_rows = types["q_smem"].chunks + types["do_smem"].chunks + 2 + with_q
    of_keys, of_values = types["k_smem"].chunks + with_k, types["v_smem"].chunks
    alone = {}
    if plan.apart:
        alone["v_full"] = plgpu.Barrier(num_arrivals=of_values)
        alone["v_empty"] = plgpu.Barrier(num_arrivals=CONSUMERS)
    return {
        **{name: x.scratch for name, x in types.items()},
        **query_rows.scratch(plan.problem, CONSUMERS, stages, BLOCK_KV),
        "statistics_smem": plgpu.SMEM((CONSUMERS, 2, 64), jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=CONSUMERS * of_rows),
        "kv_full": plgpu.Barrier(num_arrivals=of_keys + (0 if plan.apart else of_values), num_barriers=stages),
        "kv_empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        **alone,
    }


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    tiles_smem = {name: x.view(scratch[name]) for name, x in plan.tile_types().items()}
    refs = Refs(**tails.joined(dict(zip(names, gmem, strict=True))), **{**scratch, **tiles_smem})
    work = plan.schedule.work(lax.axis_index("cta"))
    keys = query_rows.key_blocks(plan.problem, refs, work, ROWS, BLOCK_KV)
    visits = sparsity.visits(plan.problem, refs, work, keys)
    wg = lax.axis_index("wg")
    consume = functools.partial(_consumer, plan, refs, work, visits, wg)
    produce = functools.partial(_producer, plan, refs, work, visits)
    lax.cond(wg < CONSUMERS, consume, produce)


def _producer(plan: Plan, refs: Refs, work: Work, visits: Visits) -> None:
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    barriers.in_warps([functools.partial(_load, plan, refs, work, visits)], 0, plan.interpret)


def _load(plan: Plan, refs: Refs, work: Work, visits: Visits) -> None:
    refs = tails.of_entry(refs, work.b)
    for w in range(CONSUMERS):
        row = work.block * ROWS + w * 64
        refs.q_smem.load(refs.q_gmem, work.b, row, work.h, w, refs.q_full)
        refs.do_smem.load(refs.do_gmem, work.b, row, work.h, w, refs.q_full)
        for n, source in enumerate((refs.lse_gmem, refs.delta_gmem)):
            rows = source.at[work.b, work.h, pl.ds(row, 64)]
            plgpu.copy_gmem_to_smem(rows, refs.statistics_smem.at[w, n], refs.q_full)
        query_rows.load(refs, work.b, row, w, refs.q_full)
        query_rows.load_of_head(refs, work.b, work.h, row, w, refs.q_full)
    kv_head, stages = lax.div(work.h, jnp.int32(plan.problem.group)), plan.tile.stages

    def load_block(step, _):
        slot = lax.rem(step, stages)
        block, _ = visits.at(step)
        first, full = block * BLOCK_KV, refs.kv_full.at[slot]
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(refs.kv_empty.at[slot]))
        refs.k_smem.load(refs.k_gmem, work.b, first, kv_head, slot, full)
        if not plan.apart:
            refs.v_smem.load(refs.v_gmem, work.b, first, kv_head, slot, full)
        query_rows.load_keys(refs, work.b, first, slot, full)
        sparsity.load(refs, work.b, work.h, work.block, block, slot, full)
        if plan.apart:
            pl.when(step > 0)(lambda: plgpu.barrier_wait(refs.v_empty))
            refs.v_smem.load(refs.v_gmem, work.b, first, kv_head, 0, refs.v_full)

    lax.fori_loop(0, visits.steps, load_block, None)


def _consumer(plan: Plan, refs: Refs, work: Work, visits: Visits, wg) -> None:
    p = plan.problem
    plgpu.set_max_registers(REGISTERS, action="increase")
    plgpu.barrier_wait(refs.q_full)
    row = work.block * ROWS + wg * 64
    lse2, delta = (_compat.load(refs.statistics_smem.at[wg, n], softmax.ROWS) for n in range(2))
    queries = query_rows.read(refs, work, wg, row, visits.range)
    rows = Rows(wg, work, queries, visits, lse2, delta, dropping.read_rows(refs, wg))

    def accumulate(dq_acc):
        lax.fori_loop(0, visits.steps, functools.partial(_step, plan, refs, rows, dq_acc), None)
        return dq_acc[...]

    dq = pl.run_scoped(accumulate, plgpu.ACC((64, tiles.padded(p.D)), jnp.float32))
    refs.q_smem.write(wg, (dq * p.scale).astype(jnp.dtype(p.dtype)))
    plgpu.commit_smem()
    refs.q_smem.store(refs.dq_gmem, work.b, row, work.h, wg)
    plgpu.wait_smem_to_gmem(0)


class Rows(NamedTuple):
    """The query rows of one consumer."""

    wg: Any
    work: Work
    queries: QueryRows
    visits: Visits
    lse2: jax.Array
    delta: jax.Array
    drop: Any  # the keys of dropout


def _step(plan: Plan, refs: Refs, rows: Rows, dq_acc, step, _) -> None:
    """dQ += dS K for one block of keys."""
    slot = lax.rem(step, plan.tile.stages) if plan.tile.stages > 1 else descriptors.zero_at(step, plan.interpret)
    plgpu.barrier_wait(refs.kv_full.at[slot])
    form = functools.partial(_ds, plan, refs, rows, step, slot)
    scores = plgpu.ACC((64, BLOCK_KV), jnp.float32)
    tma.product(dq_acc, pl.run_scoped(form, scores, scores), refs.k_smem, slot)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(refs.kv_empty.at[slot])


def _ds(plan: Plan, refs: Refs, rows: Rows, step, slot, s_acc, dp_acc) -> jax.Array:
    """dS [64, BLOCK_KV] in the input dtype."""
    p = plan.problem
    zero = descriptors.zero_at(step, plan.interpret)
    mine = rows.wg + zero
    tma.transposed_product(s_acc, refs.q_smem, mine, refs.k_smem, slot)
    if plan.apart:
        plgpu.barrier_wait(refs.v_full)
    running = tma.transposed_product(dp_acc, refs.do_smem, mine, refs.v_smem, zero if plan.apart else slot)
    keys = query_rows.key_block(refs, rows, step, slot, BLOCK_KV, plan.interpret)
    products = plgpu.wgmma_accumulator_load(s_acc, wait_n=running)
    s, factor, slope = query_rows.from_slot(
        p, refs, rows.queries, rows.wg, keys, products, plan.interpret, release=lambda: None
    )
    weights = jnp.exp2(s * factor - softmax.over_columns(rows.lse2, s.shape))
    weights = dropping.of_rows(p, weights, rows.drop, keys.number * BLOCK_KV, plan.interpret)
    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
    if plan.apart:
        plgpu.barrier_arrive(refs.v_empty)
    ds = dropping.score_gradient(p, weights, dp, softmax.over_columns(rows.delta, dp.shape))
    return (ds if slope is None else ds * slope).astype(p.dtype)

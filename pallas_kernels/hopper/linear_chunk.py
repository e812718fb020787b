"""What a consumer of linear attention does with one chunk: its products, and the state behind it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, tiles
from pallas_kernels.hopper.linear_plan import Plan, Refs
from pallas_kernels.parts import decay
from pallas_kernels.parts.decay import CHUNK, Decays

WGMMA = plgpu.Layout.WGMMA
BLOCK = (CHUNK, 64)


class Work(NamedTuple):
    """A CTA's: batch entry, segment of time, head, and the first column of v for each consumer."""

    b: jax.Array
    segment: jax.Array | int
    h: jax.Array
    columns: list[jax.Array]

    def head(self, plan: Plan, gmem):
        """The head of an operand that belongs to output head h."""
        return lax.div(self.h, jnp.int32(plan.scan.H // gmem.shape[2]))


def initial(plan: Plan, refs: Refs, work: Work, column) -> tuple[jax.Array, ...]:
    """S before the first chunk: what enters the first segment, carried through those before this one."""

    def block(gmem, entry, n):
        return _compat.load(gmem.at[entry, work.h, pl.ds(n * 64, 64), pl.ds(column, 64)], WGMMA, optimized=False)

    if refs.initial_gmem is None:
        zeros = plgpu.layout_cast(jnp.zeros(BLOCK, jnp.float32), WGMMA)
        state = (zeros,) * plan.blocks
    else:
        state = tuple(block(refs.initial_gmem, work.b, n) for n in range(plan.blocks))
    if refs.own_gmem is None:
        return state

    def carry(i, state):
        entry = work.b * plan.segments + (plan.segments - 1 - i if plan.scan.later else i)
        total = 1.0 if refs.totals_gmem is None else refs.totals_gmem[entry, work.h]
        return tuple(total * old + block(refs.own_gmem, entry, n) for n, old in enumerate(state))

    return lax.fori_loop(0, plan.segments - 1 - work.segment if plan.scan.later else work.segment, carry, state)


def output_step(plan: Plan, refs: Refs, work: Work, wg, column, step, state):
    """One chunk: its output, and the state behind it."""
    t, chunk = plan.tile, plan.chunk(work.segment, step)
    slot, mine = lax.rem(step, t.stages), lax.rem(step, t.stages) * t.warpgroups + wg
    meeting = _meeting(refs, wg, state) if plan.opposed else None
    for n, block in enumerate(state):
        refs.state_smem.multiplied[wg, 0, pl.ds(n * 64, 64)] = block.astype(plan.scan.dtype)
    plgpu.commit_smem()
    if refs.states_gmem is not None:
        plgpu.copy_smem_to_gmem(refs.state_smem.copied.at[wg, 0], _columns(plan, refs.states_gmem, work, chunk, column))
    plgpu.barrier_wait(refs.full.at[slot])
    decays = _decays(plan, refs, slot)
    weights, far = _query_products(plan, refs, wg, slot, decays)
    if plan.opposed:
        plgpu.commit_smem()  # until all four warps are through with the state
        last = step + 1 == plan.count(work.segment)
        pl.when(jnp.logical_not(last))(lambda: load_opposite(plan, refs, work, wg, column, step + 1))
    through_state = _dot(refs, mine, far) * plan.scan.scale if plan.partnered else None
    out = _value_product(plan, refs, mine, weights, far)
    state = _state_behind(plan, refs, mine, slot, decays, state)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if plan.partnered:
        refs.dots_smem[wg, 0] = _dot(refs, mine, out)
        refs.dots_smem[wg, 1] = through_state
    if plan.opposed:
        refs.dots_smem[wg, 2] = meeting
    refs.out_smem.write(wg, out.astype(plan.scan.dtype))
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.empty.at[slot])
    refs.out_smem.store(refs.out_gmem, work.b, chunk * CHUNK, work.h, wg, column=column)
    if refs.dots_gmem is not None:
        dots = refs.dots_gmem.at[work.b, work.h, lax.div(column, 64), :, pl.ds(chunk * CHUNK, CHUNK)]
        plgpu.copy_smem_to_gmem(refs.dots_smem.at[wg], dots)
    return state


def state_step(plan: Plan, refs: Refs, wg, step, carry):
    """One chunk, nearer to where the walk began than those before: what it leaves to the state at the end.

    carry: log2 of the decay through those that were before, and the state.
    """
    past, state = carry
    slot = lax.rem(step, plan.tile.stages)
    mine = slot * plan.tile.warpgroups + wg
    plgpu.barrier_wait(refs.full.at[slot])
    decays = _decays(plan, refs, slot)
    if decays is not None:
        _leave(plan, refs, mine, decays.leave() * jnp.exp2(past))
        past = past + decays.all
    state = _add_keys(plan, refs, mine, slot, state)
    plgpu.barrier_arrive(refs.empty.at[slot])
    return past, state


def load_opposite(plan: Plan, refs: Refs, work: Work, wg, column, step) -> None:
    """Starts filling the state's shared memory with that of the opposite pass at the chunk of a step."""
    source = _columns(plan, refs.opposite_gmem, work, plan.chunk(work.segment, step), column)
    plgpu.copy_gmem_to_smem(source, refs.state_smem.copied.at[wg, 0], refs.opposite_full.at[wg])


def _meeting(refs: Refs, wg, state) -> jax.Array:
    """<S, that of the opposite pass> in 64 parts."""
    plgpu.barrier_wait(refs.opposite_full.at[wg])
    products = jnp.float32(0)
    for n, block in enumerate(state):
        opposite = _compat.load(refs.state_smem.multiplied.at[wg, 0, pl.ds(n * 64, 64)], WGMMA)
        products = products + block * opposite.astype(jnp.float32)
    plgpu.commit_smem()  # until all four warps have read it
    return products.sum(axis=1)


def _columns(plan: Plan, gmem, work: Work, chunk, column):
    """A consumer's columns of the states [B, H, chunks, D, Dv] at a chunk."""
    return gmem.at[work.b, work.h, chunk, pl.ds(0, tiles.padded(plan.scan.D)), pl.ds(column, 64)]


def _dot(refs: Refs, mine, x) -> jax.Array:
    """x . partner of each token."""
    partner = _compat.load(refs.partner_smem.multiplied.at[mine, 0], WGMMA)
    return (x * partner.astype(jnp.float32)).sum(axis=1)


def _decays(plan: Plan, refs: Refs, slot) -> Decays | None:
    if refs.sums_smem is None:
        return None
    return decay.load(refs.sums_smem.at[slot], plan.scan.suffix, plan.scan.adjoint)


def _query_products(plan: Plan, refs: Refs, wg, slot, decays: Decays | None) -> tuple[jax.Array, jax.Array]:
    """The weights of the chunk, rounded, and enter q S."""
    scan = plan.scan

    def near(acc):
        for n in range(plan.blocks):
            q, k = (x.columns(slot, 64 * n, 64) for x in (refs.q_smem, refs.k_smem))
            plgpu.wgmma(acc, q, k.transpose((1, 0)))
        weights = plgpu.wgmma_accumulator_load(acc, wait_n=0)
        if decays is not None:
            weights = weights * decays.within()
        i, j = (plgpu.broadcasted_iota(jnp.int32, BLOCK, axis, layout=WGMMA) for axis in range(2))
        first, second = (i, j) if scan.later else (j, i)
        return jnp.where(first <= second if scan.diagonal else first < second, weights, 0.0).astype(scan.dtype)

    def far(acc):
        for n in range(plan.blocks):
            block = refs.state_smem.multiplied.at[wg, 0, pl.ds(64 * n, 64)]
            plgpu.wgmma(acc, refs.q_smem.columns(slot, 64 * n, 64), block)
        found = plgpu.wgmma_accumulator_load(acc, wait_n=0)
        return found if decays is None else found * decays.enter()

    acc = plgpu.ACC(BLOCK, jnp.float32)
    return pl.run_scoped(near, acc), pl.run_scoped(far, acc)


def _value_product(plan: Plan, refs: Refs, mine, weights, far) -> jax.Array:
    """out of the chunk."""

    def near(acc):
        acc[...] = far
        plgpu.wgmma(acc, weights, refs.v_smem.multiplied.at[mine, 0])
        return plgpu.wgmma_accumulator_load(acc, wait_n=0)

    return pl.run_scoped(near, plgpu.ACC(BLOCK, jnp.float32)) * plan.scan.scale


def _state_behind(plan: Plan, refs: Refs, mine, slot, decays: Decays | None, state):
    """The state behind the chunk; takes v."""
    if decays is not None:
        _leave(plan, refs, mine, decays.leave())
        state = tuple(block * decays.total() for block in state)
    return _add_keys(plan, refs, mine, slot, state)


def _leave(plan: Plan, refs: Refs, mine, factor) -> None:
    """v times a factor, in place."""
    v = refs.v_smem.multiplied.at[mine, 0]
    plgpu.commit_smem()  # until all four warps are through with v
    left = _compat.load(v, WGMMA).astype(jnp.float32) * factor
    v[...] = left.astype(plan.scan.dtype)
    plgpu.commit_smem()


def _add_keys(plan: Plan, refs: Refs, mine, slot, state):
    """The state and k^T v."""
    v = refs.v_smem.multiplied.at[mine, 0]

    def add(*accs):
        for n, (acc, block) in enumerate(zip(accs, state, strict=True)):
            acc[...] = block
            plgpu.wgmma(acc, refs.k_smem.columns(slot, 64 * n, 64).transpose((1, 0)), v)
        return tuple(plgpu.wgmma_accumulator_load(acc, wait_n=len(accs) - 1 - n) for n, acc in enumerate(accs))

    return pl.run_scoped(add, *(plgpu.ACC(BLOCK, jnp.float32) for _ in state))

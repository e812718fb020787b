"""One pass over the tokens: causal linear attention, and by exchanged operands each of its gradients.

    out_i = scale (enter_i q_i S + sum_j within_ij (q_i . k_j) v_j)    S' = total S + sum_j leave_j k_j v_j^T

S is the state [D, Dv] that enters a chunk of 64 tokens, S' the one that leaves it. The factors are decays:
from the edge of the chunk to token i, from j to i, from j to the far edge, and through the whole chunk.

Who does what. A CTA takes a head and 64 columns of v for each consumer warpgroup, and walks over the chunks.
A consumer keeps its columns of S in registers from the first chunk to the last, and a rounded copy in shared
memory, since wgmma reads its right operand there. Consumers share the loads of q and k and nothing else: each
forms the weights q k^T again, which costs tensor time that a kernel bound by memory has. One warp of the last
warpgroup loads. What leaves a token's v with leave_j is v itself, in place, after its last use.
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

from pallas_kernels import _compat, linear_tiles, tiles
from pallas_kernels.linear_tiles import LinearTile
from pallas_kernels.parts import barriers, decay, tma
from pallas_kernels.parts.decay import CHUNK, Decays

WGMMA = plgpu.Layout.WGMMA
BLOCK = (CHUNK, 64)


@dataclasses.dataclass(frozen=True)
class Scan:
    """The static facts of a pass.

    later: a token sees itself and later ones, and chunks are walked from the last to the first.
    adjoint: decays are those from i to j, as in the transpose of a pass that walks the other way.
    """

    B: int
    H: int
    S: int
    D: int
    Dv: int
    dtype: str
    scale: float
    later: bool = False
    adjoint: bool = False

    @property
    def chunks(self) -> int:
        return -(-self.S // CHUNK)

    @property
    def suffix(self) -> bool:
        """Sums of decays within a chunk run from its end to its start."""
        return self.later != self.adjoint


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    scan: Scan
    tile: LinearTile
    partnered: bool
    interpret: _compat.Interpret
    segments: int = 0  # or only the states behind so many segments of time, without q and out

    @property
    def ctas(self) -> int:
        entries = self.scan.B if not self.segments else self.scan.B // self.segments * (self.segments - 1)
        return entries * self.scan.H * self.slices

    @property
    def blocks(self) -> int:
        """Blocks of 64 rows in the state."""
        return tiles.padded(self.scan.D) // 64

    @property
    def slices(self) -> int:
        """CTAs that share a head."""
        return tiles.padded(self.scan.Dv) // (64 * self.tile.warpgroups)

    def tile_type(self, count: int, rows: int, columns: int) -> tma.TileType:
        return tma.TileType(count, rows, columns, jnp.dtype(self.scan.dtype), True, self.interpret)


class Refs(NamedTuple):
    """What a kernel sees; a feature that was not asked for is None."""

    k_gmem: Any
    v_gmem: Any
    final_gmem: Any
    k_smem: Any
    v_smem: Any  # tile slot * warpgroups + wg: 64 columns
    full: Any
    empty: Any
    q_gmem: Any = None
    out_gmem: Any = None
    q_smem: Any = None
    out_smem: Any = None
    state_smem: Any = None  # rounded, 64 columns for each consumer
    sums_gmem: Any = None  # see decay.sums
    sums_smem: Any = None
    partner_gmem: Any = None
    partner_smem: Any = None  # as v_smem
    dots_smem: Any = None
    initial_gmem: Any = None
    dots_gmem: Any = None
    states_gmem: Any = None


class Terms(NamedTuple):
    """What the gradient of the decay needs of a pass."""

    dots: jax.Array  # [B, H, chunks, CHUNK] float32: out . partner, before out is rounded
    through_state: jax.Array  # the same of what q S adds to out
    states: jax.Array  # [B, H, chunks, D, Dv] in the input dtype: the S that enters each chunk


class ScanResults(NamedTuple):
    """What a pass returns."""

    out: jax.Array  # [B, S, H, Dv] in the input dtype
    final: jax.Array  # [B, H, D, Dv] float32: S after the last chunk
    terms: Terms | None = None  # with a partner


def linear_scan(
    scan: Scan, q, k, v, log_decay=None, initial=None, partner=None, *, interpret: _compat.Interpret = None
) -> ScanResults:
    """One pass; with a partner, shaped as v, also the terms of the decay's gradient.

    q [B, S, Hq, D], k [B, S, Hk, D], v [B, S, Hv, Dv], whose heads divide H; log_decay [B|1, S|1, H] or None;
    initial: S before the first chunk, float32 [B, H, D, Dv], or None for zeros.
    """
    plan = make_plan(scan, partner is not None, interpret)
    q, k, v = (tma.fit(x, CHUNK) for x in (q, k, v))
    inputs = {"q_gmem": q, "k_gmem": k, "v_gmem": v}
    if log_decay is not None:
        inputs["sums_gmem"] = decay.sums(log_decay, scan.S, scan.suffix)
    if partner is not None:
        inputs["partner_gmem"] = tma.fit(partner, CHUNK)
    if initial is not None:
        rows, columns = (tiles.padded(n) - n for n in initial.shape[2:])
        inputs["initial_gmem"] = jnp.pad(initial, ((0, 0), (0, 0), (0, rows), (0, columns)))
    found = _launch(plan, inputs, _outputs(plan, q.shape[1], v.shape[3]))
    out, final = found["out_gmem"][:, : scan.S, :, : scan.Dv], found["final_gmem"][:, :, : scan.D, : scan.Dv]
    if partner is None:
        return ScanResults(out, final)
    through_state, dots = jnp.moveaxis(found["dots_gmem"].sum(axis=2), 2, 0)
    shape = (scan.B, scan.H, scan.chunks, CHUNK)
    states = found["states_gmem"][..., : scan.D, : scan.Dv]
    return ScanResults(out, final, Terms(dots.reshape(shape), through_state.reshape(shape), states))


def linear_states(scan: Scan, segments: int, k, v, log_decay=None, *, interpret: _compat.Interpret = None) -> jax.Array:
    """S behind each batch entry of a pass that starts from zeros, float32 [B, H, D, Dv]: k and v read once.

    Entries are segments of time, so many in a row; of the one that is walked last there is only garbage.
    """
    plan = dataclasses.replace(make_plan(scan, False, interpret), segments=segments)
    inputs = {"k_gmem": tma.fit(k, CHUNK), "v_gmem": tma.fit(v, CHUNK)}
    if log_decay is not None:
        inputs["sums_gmem"] = decay.sums(log_decay, scan.S, scan.suffix)
    found = _launch(plan, inputs, {"final_gmem": _outputs(plan, k.shape[1], scan.Dv)["final_gmem"]})
    return found["final_gmem"][:, :, : scan.D, : scan.Dv]


def _launch(plan: Plan, inputs: dict[str, jax.Array], outputs: dict[str, jax.ShapeDtypeStruct]) -> dict:
    kernel = _compat.kernel(
        functools.partial(_kernel, plan, (*inputs, *outputs)),
        name="linear_states" if plan.segments else "linear_scan",
        out_type=tuple(outputs.values()),
        scratch=_scratch(plan, "sums_gmem" in inputs),
        grid=(plan.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(plan.tile.warpgroups, 1, plan.interpret),
        interpret=plan.interpret,
    )
    return dict(zip(outputs, kernel(*inputs.values()), strict=True))


def make_plan(scan: Scan, partnered: bool, interpret: _compat.Interpret = None) -> Plan:
    tile = linear_tiles.scan_tile(tiles.padded(scan.D), tiles.padded(scan.Dv))
    if partnered:  # one more operand in the same memory
        tile = dataclasses.replace(tile, stages=2)
    return Plan(scan, tile, partnered, interpret)


def _outputs(plan: Plan, rows: int, columns: int) -> dict[str, jax.ShapeDtypeStruct]:
    scan, array = plan.scan, jax.ShapeDtypeStruct
    dtype, state = jnp.dtype(scan.dtype), (tiles.padded(scan.D), tiles.padded(scan.Dv))
    found = {
        "out_gmem": array((scan.B, rows, scan.H, columns), dtype),
        "final_gmem": array((scan.B, scan.H, *state), jnp.float32),
    }
    if plan.partnered:
        found["dots_gmem"] = array((scan.B, scan.H, state[1] // 64, 2, scan.chunks * CHUNK), jnp.float32)
        found["states_gmem"] = array((scan.B, scan.H, scan.chunks, *state), dtype)
    return found


def _tile_types(plan: Plan) -> dict[str, tma.TileType]:
    t, D = plan.tile, tiles.padded(plan.scan.D)
    found = {
        "k_smem": plan.tile_type(t.stages, CHUNK, D),
        "v_smem": plan.tile_type(t.stages * t.warpgroups, CHUNK, 64),
    }
    if not plan.segments:
        found["q_smem"] = found["k_smem"]
        found["out_smem"] = plan.tile_type(t.warpgroups, CHUNK, 64)
        found["state_smem"] = plan.tile_type(t.warpgroups, D, 64)
    if plan.partnered:
        found["partner_smem"] = found["v_smem"]
    return found


def _scratch(plan: Plan, decays: bool) -> dict[str, Any]:
    t, types = plan.tile, _tile_types(plan)
    rows = sum(types[name].chunks for name in ("q_smem", "k_smem") if name in types)
    copies = rows + (1 + plan.partnered) * t.warpgroups + decays
    return {
        **{name: x.scratch for name, x in types.items()},
        **({"sums_smem": plgpu.SMEM((t.stages, CHUNK), jnp.float32)} if decays else {}),
        **({"dots_smem": plgpu.SMEM((t.warpgroups, 2, CHUNK), jnp.float32)} if plan.partnered else {}),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=t.stages),
        "empty": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.stages),
    }


class Work(NamedTuple):
    """A CTA's: batch entry, head, and the first column of v for each consumer."""

    b: jax.Array
    h: jax.Array
    columns: list[jax.Array]

    def head(self, plan: Plan, gmem):
        """The head of an operand that belongs to output head h."""
        return lax.div(self.h, jnp.int32(plan.scan.H // gmem.shape[2]))


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    views = {name: x.view(scratch[name]) for name, x in _tile_types(plan).items()}
    refs = Refs(**dict(zip(names, gmem, strict=True)), **{**scratch, **views})
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    part, index = lax.rem(cta, plan.slices), lax.div(cta, plan.slices)
    columns = [(part * plan.tile.warpgroups + w) * 64 for w in range(plan.tile.warpgroups)]
    work = Work(_entry(plan, lax.div(index, plan.scan.H)), lax.rem(index, plan.scan.H), columns)
    consume = functools.partial(_consumer, plan, refs, work, wg)
    produce = functools.partial(_producer, plan, refs, work)
    lax.cond(wg < plan.tile.warpgroups, consume, produce)


def _entry(plan: Plan, n):
    """The n-th batch entry that is walked: of states, no segment that nothing follows."""
    if not plan.segments:
        return n
    return n + lax.div(n, jnp.int32(plan.segments - 1)) + int(plan.scan.later)


def _chunk(plan: Plan, step):
    return plan.scan.chunks - 1 - step if plan.scan.later else step


def _producer(plan: Plan, refs: Refs, work: Work) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    barriers.in_warps([functools.partial(_loader, plan, refs, work)], 0, plan.interpret)


def _loader(plan: Plan, refs: Refs, work: Work) -> None:
    t = plan.tile

    def load(step, _):
        slot, row = lax.rem(step, t.stages), _chunk(plan, step) * CHUNK
        full = refs.full.at[slot]
        pl.when(step >= t.stages)(lambda: plgpu.barrier_wait(refs.empty.at[slot]))
        for smem, gmem in ((refs.q_smem, refs.q_gmem), (refs.k_smem, refs.k_gmem)):
            if gmem is None:
                continue
            smem.load(gmem, work.b, row, work.head(plan, gmem), slot, full)
        for w, column in enumerate(work.columns):
            n = slot * t.warpgroups + w
            refs.v_smem.load(refs.v_gmem, work.b, row, work.head(plan, refs.v_gmem), n, full, column=column)
            if refs.partner_gmem is not None:
                head = work.head(plan, refs.partner_gmem)
                refs.partner_smem.load(refs.partner_gmem, work.b, row, head, n, full, column=column)
        if refs.sums_gmem is not None:
            source = refs.sums_gmem.at[tma.batch_entry(refs.sums_gmem, work.b), work.h, pl.ds(row, CHUNK)]
            plgpu.copy_gmem_to_smem(source, refs.sums_smem.at[slot], full)

    lax.fori_loop(0, plan.scan.chunks, load, None)


def _consumer(plan: Plan, refs: Refs, work: Work, wg) -> None:
    plgpu.set_max_registers(plan.tile.registers, action="increase")
    column = work.columns[0] + wg * 64
    state = tuple(_initial(refs, work, n, column) for n in range(plan.blocks))
    step = functools.partial(_state_step if plan.segments else _step, plan, refs, work, wg, column)
    state = lax.fori_loop(0, plan.scan.chunks, step, state)
    for n, block in enumerate(state):
        refs.final_gmem[work.b, work.h, pl.ds(n * 64, 64), pl.ds(column, 64)] = block
    plgpu.wait_smem_to_gmem(0)


def _initial(refs: Refs, work: Work, n: int, column) -> jax.Array:
    if refs.initial_gmem is None:
        return plgpu.layout_cast(jnp.zeros((64, 64), jnp.float32), WGMMA)
    block = refs.initial_gmem.at[work.b, work.h, pl.ds(n * 64, 64), pl.ds(column, 64)]
    return _compat.load(block, WGMMA, optimized=False)


def _step(plan: Plan, refs: Refs, work: Work, wg, column, step, state):
    """One chunk: its output, and the state behind it."""
    t, chunk = plan.tile, _chunk(plan, step)
    slot, mine = lax.rem(step, t.stages), lax.rem(step, t.stages) * t.warpgroups + wg
    for n, block in enumerate(state):
        refs.state_smem.multiplied[wg, 0, pl.ds(n * 64, 64)] = block.astype(plan.scan.dtype)
    plgpu.commit_smem()
    if refs.states_gmem is not None:
        rows = pl.ds(0, tiles.padded(plan.scan.D))
        target = refs.states_gmem.at[work.b, work.h, chunk, rows, pl.ds(column, 64)]
        plgpu.copy_smem_to_gmem(refs.state_smem.copied.at[wg, 0], target)
    plgpu.barrier_wait(refs.full.at[slot])
    decays = _decays(plan, refs, slot)
    weights, far = _query_products(plan, refs, wg, slot, decays)
    through_state = _dot(refs, mine, far) * plan.scan.scale if plan.partnered else None
    out = _value_product(plan, refs, mine, weights, far)
    state = _state_behind(plan, refs, mine, slot, decays, state)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if through_state is not None:
        refs.dots_smem[wg, 0] = through_state
        refs.dots_smem[wg, 1] = _dot(refs, mine, out)
    refs.out_smem.write(wg, out.astype(plan.scan.dtype))
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.empty.at[slot])
    refs.out_smem.store(refs.out_gmem, work.b, chunk * CHUNK, work.h, wg, column=column)
    if refs.dots_gmem is not None:
        dots = refs.dots_gmem.at[work.b, work.h, lax.div(column, 64), :, pl.ds(chunk * CHUNK, CHUNK)]
        plgpu.copy_smem_to_gmem(refs.dots_smem.at[wg], dots)
    return state


def _state_step(plan: Plan, refs: Refs, work: Work, wg, column, step, state):
    """One chunk: the state behind it."""
    slot = lax.rem(step, plan.tile.stages)
    plgpu.barrier_wait(refs.full.at[slot])
    state = _state_behind(plan, refs, slot * plan.tile.warpgroups + wg, slot, _decays(plan, refs, slot), state)
    plgpu.barrier_arrive(refs.empty.at[slot])
    return state


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
        return jnp.where(i <= j if scan.later else i >= j, weights, 0.0).astype(scan.dtype)

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
    v = refs.v_smem.multiplied.at[mine, 0]

    def behind(*accs):
        for n, (acc, block) in enumerate(zip(accs, state, strict=True)):
            acc[...] = block if decays is None else block * decays.total()
            plgpu.wgmma(acc, refs.k_smem.columns(slot, 64 * n, 64).transpose((1, 0)), v)
        return tuple(plgpu.wgmma_accumulator_load(acc, wait_n=len(accs) - 1 - n) for n, acc in enumerate(accs))

    if decays is not None:
        plgpu.commit_smem()  # until all four warps are through with v
        left = _compat.load(v, WGMMA).astype(jnp.float32) * decays.leave()
        v[...] = left.astype(plan.scan.dtype)
        plgpu.commit_smem()
    return pl.run_scoped(behind, *(plgpu.ACC(BLOCK, jnp.float32) for _ in state))

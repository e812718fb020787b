"""One pass over the tokens: causal linear attention, and by exchanged operands each of its gradients.

    out_i = scale (enter_i q_i S + sum_j within_ij (q_i . k_j) v_j)    S' = total S + sum_j leave_j k_j v_j^T

S is the state [D, Dv] that enters a chunk of 64 tokens, S' the one that leaves it. The factors are decays:
from the edge of the chunk to token i, from j to i, from j to the far edge, and through the whole chunk.

Who does what. A CTA takes a head and 64 columns of v for each consumer warpgroup, and walks over the chunks.
A consumer keeps its columns of S in registers from the first chunk to the last, and a rounded copy in shared
memory, since wgmma reads its right operand there. Consumers share the loads of q and k and nothing else: each
forms the weights q k^T again, which costs tensor time that a kernel bound by memory has. One warp of the last
warpgroup loads. What leaves a token's v with leave_j is v itself, in place, after its last use.

Time may be cut into segments. What enters one is then summed up by its CTA, from the states that a pass over k
and v alone has left behind the segments.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, tiles
from pallas_kernels.hopper import linear_chunk
from pallas_kernels.hopper.linear_chunk import Work
from pallas_kernels.hopper.linear_plan import Plan, Refs, Scan, make_plan, outputs, scratch, tile_types
from pallas_kernels.parts import barriers, decay, tma
from pallas_kernels.parts.decay import CHUNK


class Entering(NamedTuple):
    """What enters each segment of time."""

    segments: int = 1  # in which the tokens of a batch entry are cut
    initial: jax.Array | None = None  # float32 [B, H, D, Dv]: S before the first; None for zeros
    own: jax.Array | None = None  # float32 [B segments, H, D, Dv]: S behind each, from zeros; None with one segment
    totals: jax.Array | None = None  # float32 [B segments, H]: the decay through each; None for none


ZEROS = Entering()


class ScanResults(NamedTuple):
    """What a pass returns."""

    out: jax.Array  # [B, S, H, Dv] in the input dtype
    final: jax.Array  # [B, H, D, Dv] float32: S after the last chunk
    dots: jax.Array | None = None
    """[2 or 3, B, H, chunks, CHUNK] float32, with a partner: out . partner, before out is rounded, and the same of what
    q S adds to out. With an opposite also <S, opposite> of each chunk in parts to be summed."""
    states: jax.Array | None = None  # [B, H, chunks, D, Dv], padded: the S that enters each chunk, rounded


def linear_scan(
    scan: Scan, q, k, v, log_decay=None, entering=ZEROS, partner=None, opposite=None, *,
    interpret: _compat.Interpret = None,
) -> ScanResults:  # fmt: skip
    """One pass; with a partner, shaped as v, also what the decay's gradient needs.

    q [B, S, Hq, D], k [B, S, Hk, D], v [B, S, Hv, Dv], whose heads divide H; log_decay [B|1, S|1, H] or None;
    opposite: the states of a pass of the same shapes that walks the other way.
    """
    n = entering.segments
    plan = make_plan(scan, interpret, segments=n, walked=n, partnered=partner is not None, opposed=opposite is not None)
    q, k, v = (tma.fit(x, CHUNK) for x in (q, k, v))
    inputs = {"q_gmem": q, "k_gmem": k, "v_gmem": v}
    if log_decay is not None:
        inputs["sums_gmem"] = decay.sums(log_decay, scan.S, scan.suffix)
    if partner is not None:
        inputs["partner_gmem"] = tma.fit(partner, CHUNK)
    for name, x in (("initial_gmem", entering.initial), ("own_gmem", entering.own)):
        if x is not None:
            rows, columns = (tiles.padded(m) - m for m in x.shape[2:])
            inputs[name] = jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, columns)))
    rest = {"totals_gmem": entering.totals, "opposite_gmem": opposite}
    inputs |= {name: x for name, x in rest.items() if x is not None}
    found = _launch(plan, inputs, outputs(plan, q.shape[1], v.shape[3]))
    out, final = found["out_gmem"][:, : scan.S, :, : scan.Dv], found["final_gmem"][:, :, : scan.D, : scan.Dv]
    final = final.reshape(scan.B, n, *final.shape[1:])[:, 0 if scan.later else -1]
    if partner is None:
        return ScanResults(out, final)
    dots = jnp.moveaxis(found["dots_gmem"].sum(axis=2), 2, 0).reshape(plan.dots, scan.B, scan.H, scan.chunks, CHUNK)
    return ScanResults(out, final, dots, found.get("states_gmem"))


def linear_states(
    scan: Scan, segments: int, walked: int, k, v, log_decay=None, *, interpret: _compat.Interpret = None
) -> jax.Array:
    """S behind each segment of a pass that starts from zeros, float32 [B segments, H, D, Dv]: k and v read once.

    Behind those that come last and are not walked there is only garbage.
    """
    plan = make_plan(scan, interpret, segments=segments, walked=walked, states=True)
    inputs = {"k_gmem": tma.fit(k, CHUNK), "v_gmem": tma.fit(v, CHUNK)}
    if log_decay is not None:
        inputs["sums_gmem"] = decay.sums(log_decay, scan.S, scan.suffix)
    found = _launch(plan, inputs, outputs(plan, k.shape[1], scan.Dv))
    return found["final_gmem"][:, :, : scan.D, : scan.Dv]


def _launch(plan: Plan, inputs: dict[str, jax.Array], results: dict[str, jax.ShapeDtypeStruct]) -> dict:
    kernel = _compat.kernel(
        functools.partial(_kernel, plan, (*inputs, *results)),
        name="linear_states" if plan.states else "linear_scan",
        out_type=tuple(results.values()),
        scratch=scratch(plan, "sums_gmem" in inputs),
        grid=(plan.ctas,),
        grid_names=("cta",),
        warpgroups=barriers.warpgroups(plan.tile.warpgroups, 1, plan.interpret),
        interpret=plan.interpret,
    )
    return dict(zip(results, kernel(*inputs.values()), strict=True))


def _kernel(plan: Plan, names: tuple[str, ...], *gmem, **scratch) -> None:
    views = {name: x.view(scratch[name]) for name, x in tile_types(plan).items()}
    refs = Refs(**dict(zip(names, gmem, strict=True)), **{**scratch, **views})
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    part, index = lax.rem(cta, plan.slices), lax.div(cta, plan.slices)
    h, entry = lax.rem(index, plan.scan.H), lax.div(index, plan.scan.H)
    b, segment = (entry, 0) if plan.segments == 1 else (lax.div(entry, plan.walked), lax.rem(entry, plan.walked))
    if plan.walked != plan.segments and plan.scan.later:
        segment = segment + 1
    columns = [(part * plan.tile.warpgroups + w) * 64 for w in range(plan.tile.warpgroups)]
    work = Work(b, segment, h, columns)
    consume = functools.partial(_consumer, plan, refs, work, wg)
    produce = functools.partial(_producer, plan, refs, work)
    lax.cond(wg < plan.tile.warpgroups, consume, produce)


def _producer(plan: Plan, refs: Refs, work: Work) -> None:
    plgpu.set_max_registers(plan.tile.producer_registers, action="decrease")
    barriers.in_warps([functools.partial(_loader, plan, refs, work)], 0, plan.interpret)


def _loader(plan: Plan, refs: Refs, work: Work) -> None:
    t = plan.tile

    def load(step, _):
        slot, row = lax.rem(step, t.stages), plan.chunk(work.segment, step) * CHUNK
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

    lax.fori_loop(0, plan.count(work.segment), load, None)


def _consumer(plan: Plan, refs: Refs, work: Work, wg) -> None:
    plgpu.set_max_registers(plan.tile.registers, action="increase")
    column = work.columns[0] + wg * 64
    if plan.states:
        start = jnp.float32(0), linear_chunk.initial(plan, refs, work, column)
        step = functools.partial(linear_chunk.state_step, plan, refs, wg)
        _, state = lax.fori_loop(0, plan.count(work.segment), step, start)
    else:
        if plan.opposed:
            linear_chunk.load_opposite(plan, refs, work, wg, column, 0)
        start = linear_chunk.initial(plan, refs, work, column)
        step = functools.partial(linear_chunk.output_step, plan, refs, work, wg, column)
        state = lax.fori_loop(0, plan.count(work.segment), step, start)
    for n, block in enumerate(state):
        entry = work.b * plan.segments + work.segment
        refs.final_gmem[entry, work.h, pl.ds(n * 64, 64), pl.ds(column, 64)] = block
    plgpu.wait_smem_to_gmem(0)

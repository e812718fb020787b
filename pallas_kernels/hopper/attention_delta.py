"""Before the backward, in one pass over O and dO: the row statistics, and zeros where dQ will be summed.

    delta = rowsum(dO O) - dlse        lse2 = lse log2(e)

An lse2 of +inf makes the probabilities of a row zero: rows that see no key, and rows of padding. One
warpgroup takes 64 rows of one head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat
from pallas_kernels.hopper.attention_backward import Plan
from pallas_kernels.parts import softmax, tma

ROWS = 64


def attention_delta(plan: Plan, out, lse, d_out, d_lse) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """lse2 and delta, float32 [B, H, Sq padded to whole blocks], and zeros of `plan.dq_shape`.

    There are no zeros where dQ comes apart: nothing is added into them.
    """
    p, t = plan.problem, plan.tile
    rows = plan.query_blocks * t.block_q
    tail = ((0, 0), (0, 0), (0, rows - p.Sq))
    lse, d_lse = jnp.pad(lse, tail, constant_values=-jnp.inf), jnp.pad(d_lse, tail)
    tile = plan.tile_type(2, ROWS, p.Dv)
    statistic = jax.ShapeDtypeStruct((p.B, p.H, rows), jnp.float32)
    zeros, zero_smem = [], {}
    if not t.dq_apart:
        zeros = [jax.ShapeDtypeStruct(plan.dq_shape, jnp.float32)]
        zero_smem = {"zero_smem": plgpu.SMEM(plan.dq_shape[-2:], jnp.float32)}
    kernel = _compat.kernel(
        functools.partial(_kernel, plan),
        name="attention_delta",
        out_type=(statistic, statistic, *zeros),
        scratch={
            "tile_smem": tile.scratch,
            "rows_smem": plgpu.SMEM((2, ROWS), jnp.float32),
            **zero_smem,
            "full": plgpu.Barrier(num_arrivals=2 * tile.chunks + 2),
        },
        grid=(p.B * p.H * rows // ROWS,),
        grid_names=("cta",),
        warpgroups=1,
        interpret=plan.interpret,
    )
    lse2, delta, *zeros = kernel(*(tma.fit(x, ROWS) for x in (out, d_out)), lse, d_lse)
    return lse2, delta, zeros[0] if zeros else None


def _kernel(
    plan: Plan,
    out_gmem,
    do_gmem,
    lse_gmem,
    dlse_gmem,
    lse2_gmem,
    delta_gmem,
    dq_gmem=None,
    *,
    tile_smem,
    rows_smem,
    full,
    zero_smem=None,
) -> None:
    p, t = plan.problem, plan.tile
    blocks = plan.query_blocks * t.block_q // ROWS
    index = lax.axis_index("cta")
    block, head = lax.rem(index, blocks), lax.div(index, blocks)
    b, h, row = lax.div(head, p.H), lax.rem(head, p.H), block * ROWS
    tile = plan.tile_type(2, ROWS, p.Dv).view(tile_smem)
    here = (b, h, pl.ds(row, ROWS))
    for n, source in enumerate((out_gmem, do_gmem)):
        tile.load(source, b, row, h, n, full)
    for n, source in enumerate((lse_gmem, dlse_gmem)):
        plgpu.copy_gmem_to_smem(source.at[here], rows_smem.at[n], full)
    if dq_gmem is not None:
        _zero(plan, dq_gmem, zero_smem, b, h, row)
    plgpu.barrier_wait(full)
    lse, d_lse = (_compat.load(rows_smem.at[n], softmax.ROWS) for n in range(2))
    delta = -d_lse
    for c in range(tile.type.chunks):
        o, do = (_compat.load(tile.multiplied.at[n, c], plgpu.Layout.WGMMA).astype(jnp.float32) for n in range(2))
        delta = delta + (o * do).sum(axis=1)
    delta = jnp.where(lse == -jnp.inf, 0.0, delta)  # a row that sees nothing has no gradient, even of NaN
    plgpu.commit_smem()
    rows_smem[0] = jnp.where(lse == -jnp.inf, jnp.inf, lse * softmax.LOG2E)
    rows_smem[1] = delta
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(rows_smem.at[0], lse2_gmem.at[here])
    plgpu.copy_smem_to_gmem(rows_smem.at[1], delta_gmem.at[here])
    plgpu.wait_smem_to_gmem(0)


def _zero(plan: Plan, dq_gmem, zero_smem, b, h, row) -> None:
    """Zeroes the parts of dQ that begin in these rows."""
    t = plan.tile
    zero_smem[...] = plgpu.layout_cast(
        jnp.zeros(plan.dq_shape[-2:], jnp.float32), plgpu.Layout.WG_STRIDED(plan.dq_shape[-2:], vec_size=4)
    )
    plgpu.commit_smem()

    @pl.when(lax.rem(row, t.block_q) == 0)
    def _():
        for part in range(plan.dq_parts):
            plgpu.copy_smem_to_gmem(zero_smem, dq_gmem.at[b, h, lax.div(row, t.block_q), part])

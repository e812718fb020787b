"""After the backward: dQ = scale * (the float32 sum), from register order to rows, in the input dtype.

One CTA takes one query block: each of its warpgroups reads a part as a consumer of the backward kernel formed
it, straight into the registers it came from, and writes it out through shared memory.
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
from pallas_kernels.parts import register_order, tma
from pallas_kernels.parts.barriers import NamedBarrier


def attention_dq(plan: Plan, dq: jax.Array) -> jax.Array:
    """dQ [B, Sq, H, D] from the float32 buffer of `plan.dq_shape`."""
    p, t = plan.problem, plan.tile
    dtype = jnp.dtype(p.dtype)
    out_type = plan.tile_type(1, t.block_q, p.D)
    kernel = _compat.kernel(
        functools.partial(_kernel, plan),
        name="attention_dq",
        out_type=jax.ShapeDtypeStruct((p.B, max(p.Sq, t.block_q), p.H, tma.fitted(p.D)), dtype),
        scratch={
            "dq_smem": plgpu.SMEM(plan.dq_shape[-3:], jnp.float32),
            "out_smem": out_type.scratch,
            "full": plgpu.Barrier(num_barriers=plan.dq_parts),
            "met": _meeting(plan).scratch,
        },
        grid=(p.B * p.H * plan.query_blocks,),
        grid_names=("cta",),
        warpgroups=plan.dq_parts,
        interpret=plan.interpret,
    )
    return kernel(dq)[:, : p.Sq, :, : p.D]


def _meeting(plan: Plan) -> NamedBarrier:
    return NamedBarrier(0, threads=128 * plan.dq_parts, meeting=plan.dq_parts, interpret=plan.interpret)


def _kernel(plan: Plan, dq_gmem, out_gmem, *, dq_smem, out_smem, full, met) -> None:
    p, t = plan.problem, plan.tile
    index, wg = lax.axis_index("cta"), lax.axis_index("wg")
    block = lax.rem(index, jnp.int32(plan.query_blocks))
    head = lax.rem(lax.div(index, jnp.int32(plan.query_blocks)), jnp.int32(p.H))
    b = lax.div(index, jnp.int32(plan.query_blocks * p.H))
    out = plan.tile_type(1, t.block_q, p.D).view(out_smem)
    plgpu.copy_gmem_to_smem(dq_gmem.at[b, head, block, wg], dq_smem.at[wg], full.at[wg])
    plgpu.barrier_wait(full.at[wg])
    rows, columns = plan.dq_tile
    part = register_order.from_memory(dq_smem.at[wg], rows, columns, plan.interpret)
    part = (part * p.scale).astype(p.dtype)
    if t.split_rows:
        out.write(0, part, rows=pl.ds(wg * rows, rows))
    else:
        out.columns(0, wg * columns, columns)[...] = part
    plgpu.commit_smem()
    _meeting(plan).meet(met)

    @pl.when(wg == 0)
    def _():
        out.store(out_gmem, b, block * t.block_q, head, 0)
        plgpu.wait_smem_to_gmem(0)

"""What is static about a launch of the forward kernel: tiles in shared memory, arrays, the order of its work."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, tiles
from pallas_kernels.parts import barriers, bias, query_rows, ranges, schedule, sparsity, tma
from pallas_kernels.parts.barriers import NamedBarrier
from pallas_kernels.parts.schedule import Schedule
from pallas_kernels.problem import AttentionProblem

_HEADS_OF_A_ROUND = 16  # eight CTAs then share what they read of a head
_ENDS = 2.0  # key blocks' worth of time that the start and the end of a tile take


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    problem: AttentionProblem
    tile: tiles.ForwardTile
    schedule: Schedule
    any_row: bool
    interpret: _compat.Interpret

    @property
    def turn(self) -> NamedBarrier:
        return barriers.turns(self.tile.warpgroups, self.interpret)

    @property
    def takes_turns(self) -> bool:
        return self.tile.warpgroups > 1

    @property
    def has_places(self) -> bool:
        """Whether a tile's row block, and which keys it visits, comes to shared memory with its Q."""
        return self.problem.key_ranges and not sparsity.is_listed(self.problem)

    @property
    def table(self) -> np.ndarray:
        """What the CTAs take: a tile costs its key blocks, and its two ends as much as some more.

        Where only the run knows the blocks, the longest tiles come first, and we guess a steady fall.
        """
        if self.problem.key_ranges:
            return self.schedule.table(range(self.schedule.blocks, 0, -1))
        with jax.ensure_compile_time_eval():
            first = jnp.arange(self.schedule.blocks) * self.tile.rows
            keys = ranges.key_blocks(self.problem, first, self.tile.rows, self.tile.block_kv)
            steps = np.broadcast_to(np.asarray(keys.hi - keys.lo), first.shape)
        return self.schedule.table(steps + _ENDS)

    @property
    def tile_types(self) -> dict[str, tma.TileType]:
        p, t = self.problem, self.tile
        D, Dv, queries = tiles.padded(p.D), tiles.padded(p.Dv), t.q_stages * t.warpgroups
        rest = jnp.dtype(p.dtype), self.any_row, self.interpret
        return {
            "q_smem": tma.TileType(queries, 64, D, *rest),
            "k_smem": tma.TileType(t.stages, t.block_kv, D, *rest),
            "v_smem": tma.TileType(t.stages, t.block_kv, Dv, *rest),
            "out_smem": tma.TileType(queries, 64, Dv, *rest),
        }


class Refs(NamedTuple):
    """What a kernel sees; a feature that was not asked for is None."""

    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    out_gmem: Any
    lse_gmem: Any
    q_smem: Any
    k_smem: Any
    v_smem: Any
    out_smem: Any  # other views of q_smem
    lse_smem: Any
    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    turn: Any
    table_gmem: Any = None
    sinks_gmem: Any = None
    slopes_gmem: Any = None
    slopes_smem: Any = None  # of rows, see alibi
    q_ids_gmem: Any = None
    kv_ids_gmem: Any = None
    q_ids_smem: Any = None
    kv_ids_smem: Any = None
    limits_gmem: Any = None  # [B|1, 2, rows]: the first and the last key of each row
    limits_smem: Any = None
    visits_gmem: Any = None  # see ranges.table
    places_gmem: Any = None  # see ranges.places
    places_smem: Any = None
    order_gmem: Any = None  # see schedule.placed
    listed_gmem: Any = None  # this and the next two: see sparsity
    bits_gmem: Any = None
    bits_smem: Any = None
    bias_gmem: Any = None
    drop_gmem: Any = None  # [B, H, 2, rows], see dropping
    drop_smem: Any = None


def make_plan(p: AttentionProblem, interpret: _compat.Interpret = None) -> Plan:
    tile = tiles.forward_tile(p)
    bytes_per_group = 2 * p.Sk * (p.D + p.Dv)
    blocks = -(-p.Sq // tile.rows)
    section = p.B if bias.is_shared(p) else 1
    if p.right is not None or p.key_ranges:
        section = max(section, schedule.section(p.B * p.H, p.group, bytes_per_group))
    if p.key_ranges:  # a round of tiles from the same blocks, so that what is guessed of them matters less
        section = max(section, schedule.section(p.B * p.H, _HEADS_OF_A_ROUND, 1, budget=1))
    order = Schedule(
        batch=p.B,
        heads=p.H,
        blocks=blocks,
        section=section,
        descending=p.right is not None,
        persistent=True,
        across_batch=bias.is_shared(p),
    )
    # An output narrower than its Q takes the first chunks of columns of that, which `any_row` keeps apart.
    any_row = tma.is_ragged(p) or tiles.padded(p.D) != tiles.padded(p.Dv)
    return Plan(p, tile, order, any_row, interpret)


def scratch(plan: Plan) -> dict[str, Any]:
    t = plan.tile
    types = plan.tile_types
    with_q, with_k = query_rows.copies(plan.problem)
    of_place = {"places_smem": plgpu.SMEM((t.q_stages, ranges.PLACE), jnp.int32)} if plan.has_places else {}
    return {
        **of_place,
        **{name: types[name].scratch for name in ("q_smem", "k_smem", "v_smem")},
        **query_rows.scratch(plan.problem, t.warpgroups, t.stages, t.block_kv, t.q_stages),
        "lse_smem": plgpu.SMEM((t.warpgroups, 64), jnp.float32),
        "q_full": plgpu.Barrier(
            num_arrivals=t.warpgroups * (types["q_smem"].chunks + with_q) + len(of_place), num_barriers=t.q_stages
        ),
        "q_empty": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.q_stages),
        "k_full": plgpu.Barrier(num_arrivals=types["k_smem"].chunks + with_k, num_barriers=t.stages),
        "k_empty": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.stages),
        "v_full": plgpu.Barrier(num_arrivals=types["v_smem"].chunks, num_barriers=t.stages),
        "v_empty": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.stages),
        "turn": plan.turn.scratch,
    }

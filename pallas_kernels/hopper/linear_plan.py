"""What is static about a pass of linear attention: its facts, its tiles in shared memory, its arrays."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, linear_tiles, tiles
from pallas_kernels.linear_tiles import LinearTile
from pallas_kernels.parts import tma
from pallas_kernels.parts.decay import CHUNK


@dataclasses.dataclass(frozen=True)
class Scan:
    """The static facts of a pass.

    later: a token sees itself and later ones, and chunks are walked from the last to the first.
    adjoint: decays are those from i to j, as in the transpose of a pass that walks the other way.
    diagonal: a token sees itself.
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
    diagonal: bool = True

    @property
    def chunks(self) -> int:
        return -(-self.S // CHUNK)

    @property
    def suffix(self) -> bool:
        """Sums of decays within a chunk run from its end to its start."""
        return self.later != self.adjoint


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch.

    Time is cut into segments, which CTAs walk side by side. Those that come last in the walk may be left out.
    """

    scan: Scan
    tile: LinearTile
    interpret: _compat.Interpret
    segments: int = 1
    walked: int = 1  # of so many
    states: bool = False  # only the states behind the segments, without q and out
    partnered: bool = False
    opposed: bool = False

    @property
    def ctas(self) -> int:
        return self.scan.B * self.walked * self.scan.H * self.slices

    @property
    def blocks(self) -> int:
        """Blocks of 64 rows in the state."""
        return tiles.padded(self.scan.D) // 64

    @property
    def slices(self) -> int:
        """CTAs that share a head."""
        return tiles.padded(self.scan.Dv) // (64 * self.tile.warpgroups)

    @property
    def dots(self) -> int:
        """Kinds of numbers a token that the gradient of a decay needs."""
        return 2 * self.partnered + self.opposed

    @property
    def length(self) -> int:
        """Chunks of a segment; the last may have fewer."""
        return -(-self.scan.chunks // self.segments)

    def count(self, segment):
        """Chunks of that segment."""
        if self.scan.chunks % self.segments == 0:
            return self.length
        return jnp.minimum(self.length, self.scan.chunks - segment * self.length)

    def chunk(self, segment, step):
        """The chunk of a step. States are found from the far end: what is read last is read first by what follows."""
        descends = self.scan.later != self.states
        return segment * self.length + (self.count(segment) - 1 - step if descends else step)

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
    dots_gmem: Any = None
    dots_smem: Any = None
    initial_gmem: Any = None
    own_gmem: Any = None  # the states behind the segments, each from zeros
    totals_gmem: Any = None  # and the decays through them
    states_gmem: Any = None
    opposite_gmem: Any = None  # the states of a pass that walks the other way
    opposite_full: Any = None


def make_plan(scan: Scan, interpret: _compat.Interpret = None, **options) -> Plan:
    tile = linear_tiles.scan_tile(scan.B * scan.H, tiles.padded(scan.D), tiles.padded(scan.Dv))
    if options.get("partnered"):  # one more operand in the same memory
        tile = dataclasses.replace(tile, stages=2)
    return Plan(scan, tile, interpret, **options)


def outputs(plan: Plan, rows: int, columns: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a launch writes, of v with so many rows and columns."""
    scan, array = plan.scan, jax.ShapeDtypeStruct
    dtype, state = jnp.dtype(scan.dtype), (tiles.padded(scan.D), tiles.padded(scan.Dv))
    found = {"final_gmem": array((scan.B * plan.segments, scan.H, *state), jnp.float32)}
    if not plan.states:
        found["out_gmem"] = array((scan.B, rows, scan.H, columns), dtype)
    if plan.partnered:
        found["dots_gmem"] = array((scan.B, scan.H, state[1] // 64, plan.dots, scan.chunks * CHUNK), jnp.float32)
    if plan.partnered and not plan.opposed:
        found["states_gmem"] = array((scan.B, scan.H, scan.chunks, *state), dtype)
    return found


def tile_types(plan: Plan) -> dict[str, tma.TileType]:
    t, D = plan.tile, tiles.padded(plan.scan.D)
    found = {
        "k_smem": plan.tile_type(t.stages, CHUNK, D),
        "v_smem": plan.tile_type(t.stages * t.warpgroups, CHUNK, 64),
    }
    if not plan.states:
        found["q_smem"] = found["k_smem"]
        found["out_smem"] = plan.tile_type(t.warpgroups, CHUNK, 64)
        found["state_smem"] = plan.tile_type(t.warpgroups, D, 64)
    if plan.partnered:
        found["partner_smem"] = found["v_smem"]
    return found


def scratch(plan: Plan, decays: bool) -> dict[str, Any]:
    t, types = plan.tile, tile_types(plan)
    rows = sum(types[name].chunks for name in ("q_smem", "k_smem") if name in types)
    copies = rows + (1 + plan.partnered) * t.warpgroups + decays
    found = {name: x.scratch for name, x in types.items()}
    if decays:
        found["sums_smem"] = plgpu.SMEM((t.stages, CHUNK), jnp.float32)
    if plan.partnered:
        found["dots_smem"] = plgpu.SMEM((t.warpgroups, plan.dots, CHUNK), jnp.float32)
    if plan.opposed:
        found["opposite_full"] = plgpu.Barrier(num_arrivals=1, num_barriers=t.warpgroups)
    found["full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=t.stages)
    found["empty"] = plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.stages)
    return found

"""One table: head dim -> tile of the scan of linear attention."""

from __future__ import annotations

import dataclasses

from pallas_kernels.parts.schedule import SMS


@dataclasses.dataclass(frozen=True)
class LinearTile:
    """A CTA takes 64 columns of v for each of `warpgroups`; `stages` chunks of 64 tokens are loaded ahead."""

    warpgroups: int
    stages: int
    registers: int  # of a consumer
    producer_registers: int = 24
    ctas: int = 1  # that an SM holds at a time
    spill_bytes: int = 0  # what ptxas may spill; the compile test fails above it


# Measured on an H100 80GB HBM3 on 2026-11-22, forward, ms (and times the memory floor).
SCAN = {
    # B8 T4096 H32: 0.197 (1.10), with a decay by head 0.212 (1.19)
    64: LinearTile(warpgroups=1, stages=3, registers=128, ctas=2, spill_bytes=20),
    # B8 T4096 H32: 0.377 (1.06), with a decay by head 0.384 (1.07);
    # by token 0.397, with 2 stages 0.385, with 1 warpgroup 0.410
    128: LinearTile(warpgroups=2, stages=3, registers=240),
    192: LinearTile(warpgroups=1, stages=3, registers=248, spill_bytes=16),  # not timed
    # B4 T16384 H8: 0.502 (1.40)
    256: LinearTile(warpgroups=1, stages=2, registers=248, spill_bytes=200),
}


def scan_tile(heads: int, head_dim: int, value_dim: int) -> LinearTile:
    """Of so many heads, those of the batch together; head dims are multiples of 64.

    Few heads take more CTAs before they take more segments of time. B2 T16384 H16 D128, ms forward / and backward: one
    warpgroup and 2 segments 0.243 / 0.897, 4 segments 0.276 / 0.998; two warpgroups and 4 segments, of B1 H32,
    0.265 / 0.998, 2 segments 0.287 / 1.087.
    """
    tile, slices = SCAN[head_dim], value_dim // 64
    alone = slices % tile.warpgroups != 0 or heads * slices <= SMS
    return dataclasses.replace(tile, warpgroups=1) if alone else tile

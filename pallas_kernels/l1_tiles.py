"""The tiles of the L1 kernels, by head dim. Times beside a row: where it was measured, and how long it took."""

from __future__ import annotations

import dataclasses

from pallas_kernels.problem import L1Problem
from pallas_kernels.tiles import padded


@dataclasses.dataclass(frozen=True)
class L1ForwardTile:
    """64 * halves query rows for each of `warpgroups`, block_kv keys a step, `stages` steps loaded ahead."""

    block_kv: int
    warpgroups: int = 2
    halves: int = 1
    stages: int = 2
    registers: int = 240  # of a consumer
    producer_registers: int = 24
    spill_bytes: int = 0

    @property
    def rows(self) -> int:
        return 64 * self.halves * self.warpgroups


FORWARD = {
    64: L1ForwardTile(block_kv=64, halves=2),
    128: L1ForwardTile(block_kv=64, stages=1),
}


def forward_tile(p: L1Problem) -> L1ForwardTile:
    return FORWARD[max(padded(p.D), padded(p.Dv))]


def parts(p: L1Problem) -> int:
    """How many bfloat16 numbers, each what the ones before left over, make up a value or a weight."""
    return 3 if p.dtype == "float32" else 1

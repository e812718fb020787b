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
    spill_bytes: int = 0  # none of it inside the loops over features

    @property
    def rows(self) -> int:
        return 64 * self.halves * self.warpgroups


@dataclasses.dataclass(frozen=True)
class L1BackwardTile:
    """64 rows that stay for each of `warpgroups`, `block` rows that pass by a step."""

    warpgroups: int = 2
    block: int = 64
    stages: int = 1
    registers: int = 240  # of a consumer
    producer_registers: int = 24
    spill_bytes: int = 0  # none of it inside the loops over features

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


FORWARD = {
    64: L1ForwardTile(block_kv=64, halves=2),
    128: L1ForwardTile(block_kv=64, stages=1, spill_bytes=160),
}
PACKED_FORWARD = {
    64: L1ForwardTile(block_kv=64, halves=2),
    128: L1ForwardTile(block_kv=64),
}


BACKWARD = {
    64: L1BackwardTile(stages=2, spill_bytes=16),
    128: L1BackwardTile(spill_bytes=720),
}
FLOAT32_BACKWARD_128 = L1BackwardTile(warpgroups=1, spill_bytes=1400)  # more does not fit the shared memory


def packed(p: L1Problem) -> bool:
    """Whether the forward finds distances from maxima of 16-bit numbers, two at a time."""
    return parts(p) == 1 and p.compute == "auto"


def forward_tile(p: L1Problem) -> L1ForwardTile:
    return (PACKED_FORWARD if packed(p) else FORWARD)[max(padded(p.D), padded(p.Dv))]


def backward_tile(p: L1Problem) -> L1BackwardTile:
    D = max(padded(p.D), padded(p.Dv))
    return FLOAT32_BACKWARD_128 if D == 128 and p.dtype == "float32" else BACKWARD[D]


def parts(p: L1Problem) -> int:
    """How many bfloat16 numbers, each what the ones before left over, make up a value or a weight."""
    return 3 if p.dtype == "float32" else 1

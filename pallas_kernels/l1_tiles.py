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
    """64 rows that stay for each of `warpgroups`, `block` rows that pass by a step, loaded `stages` steps ahead."""

    warpgroups: int = 2
    block: int = 64
    stages: int = 1
    registers: int = 240  # of a consumer
    producer_registers: int = 24
    packed: bool = False  # bfloat16 two at a time, see `l1_maxima` and `l1_signs`, else all in float32
    spill_bytes: int = 0  # none of it inside the loops over features

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


# ms on an H100 80GB HBM3, 2026-11-22: head dim 64 with B1 H16 S4096, 128 with B1 H8 S2048. What comes after "before"
# was measured before features were crossed (`swizzled_rows`).
FORWARD = {
    # float32 1.70; before 1.72, two stages 1.76, block_kv=128 1.78
    64: L1ForwardTile(64, halves=2, stages=1),
    # float32 0.51; before 0.51, one warpgroup 1.26
    128: L1ForwardTile(64, stages=1, spill_bytes=148),
}
PACKED_FORWARD = {
    # bfloat16 1.06; before 1.16, two stages 1.23, block_kv=128 1.24
    64: L1ForwardTile(64, halves=2, stages=3),
    # bfloat16 0.28; before 0.30, block_kv=64 0.35
    128: L1ForwardTile(128, stages=1),
}

# dQ, then dK and dV.
FLOAT32_BACKWARD = {
    # 3.78 + 4.18; before 3.90 + 4.37, one stage 4.15 + 4.71, one warpgroup 4.40 + 4.87
    64: L1BackwardTile(stages=2, spill_bytes=16),
    # 1.20 + 2.46; before 1.26 + 2.54. More does not fit the shared memory
    128: L1BackwardTile(warpgroups=1, spill_bytes=1348),
}
BACKWARD = {  # float16, and where distances are to be subtracted
    # bfloat16 3.72 + 3.90; before 3.84 + 4.04, two stages 3.92 + 4.20, one warpgroup 4.40 + 4.44
    64: L1BackwardTile(),
    # bfloat16 before 0.95 + 1.27, one warpgroup 1.05 + 1.78
    128: L1BackwardTile(spill_bytes=708),
}
PACKED_BACKWARD = {
    # 2.37 + 2.48; one stage 2.53 + 2.63, before 2.65 + 2.74, three warpgroups 2.66 + 3.27
    64: L1BackwardTile(packed=True, stages=2),
    # 0.66 + 0.90; one warpgroup 0.79 + 1.26
    128: L1BackwardTile(packed=True, spill_bytes=612),
}


def packed(p: L1Problem) -> bool:
    """Whether the forward finds distances from maxima of 16-bit numbers, two at a time."""
    return parts(p) == 1 and p.compute == "auto"


def forward_tile(p: L1Problem) -> L1ForwardTile:
    return (PACKED_FORWARD if packed(p) else FORWARD)[max(padded(p.D), padded(p.Dv))]


def backward_tile(p: L1Problem) -> L1BackwardTile:
    tiles = FLOAT32_BACKWARD if p.dtype == "float32" else BACKWARD
    if packed(p) and p.dtype == "bfloat16":
        tiles = PACKED_BACKWARD
    return tiles[max(padded(p.D), padded(p.Dv))]


def parts(p: L1Problem) -> int:
    """How many bfloat16 numbers, each what the ones before left over, make up a value or a weight."""
    return 3 if p.dtype == "float32" else 1

"""One table: head dim and bytes of a mask's element -> tiles of masked linear attention.

Measured on an H100, the kernels alone; other tiles are in docs/performance.md.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.tiles import BackwardTile


@dataclasses.dataclass(frozen=True)
class MaskedForward:
    """64 query rows for each of `warpgroups`, of up to `together` heads that share a mask; block_kv keys a step.

    cluster: CTAs with neighbouring rows that share what they read of K and V.
    """

    together: int = 1
    cluster: int = 2
    block_kv: int = 128
    warpgroups: int = 2
    stages: int = 2
    mask_stages: int = 2
    q_stages: int = 1  # 2: Q of the next tile comes while this one is computed, for short sequences
    registers: int = 240  # of a consumer
    producer_registers: int = 24
    turns: bool = True  # consumers take turns at the tensor cores
    spill_bytes: int = 0  # what ptxas may spill; the compile test fails above it

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


@dataclasses.dataclass(frozen=True)
class MaskedBackward(BackwardTile):
    """The tile of a fused backward, and how many tiles of the mask are loaded ahead."""

    mask_stages: int = 2
    rereads: bool = False  # the mask is read for each of its two uses, where registers are short


@dataclasses.dataclass(frozen=True)
class MaskGradientTile:
    """128 x 128 of the mask's gradient a CTA; `stages` pairs of factors are loaded ahead.

    cluster: CTAs with neighbouring rows that share what they read of k and v.
    """

    stages: int = 3
    cluster: int = 2
    registers: int = 240
    producer_registers: int = 24
    spill_bytes: int = 0


FORWARD = {
    # 549-570 TF/s at B16 S1024 H12, one mask for all; with 128 keys a step and one slot for the mask 298-340
    (64, 2): MaskedForward(together=2, block_kv=64, stages=3, mask_stages=3, q_stages=2),
    (64, 4): MaskedForward(together=2, block_kv=64, stages=3, q_stages=2),  # not timed
    (128, 2): MaskedForward(),  # 708-710 at B4 S8192 H16
    (128, 4): MaskedForward(block_kv=64, mask_stages=3),  # not timed
}

BACKWARD = {
    (64, 2): MaskedBackward(block_q=128, split_rows=True, mask_stages=1),
    (64, 4): MaskedBackward(block_q=128, split_rows=True, ds_stages=1, mask_stages=1, rereads=True, spill_bytes=36),
    (128, 2): MaskedBackward(block_q=64),
    (128, 4): MaskedBackward(block_q=64, mask_stages=1),
}

GRADIENT = {64: MaskGradientTile(stages=6), 128: MaskGradientTile()}

"""Shared-memory tiles of float32 rows for the CUDA cores, filled by TMA.

A tile is cut into chunks of 32 columns, 128 bytes, under TMA's 128-byte swizzle: then threads that read the same
column of neighbouring rows, four features at a time, do not meet in a bank. TMA may start at any row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 32
TRANSFORMS = (plgpu.SwizzleTransform(128),)


@dataclasses.dataclass(frozen=True)
class RowsType:
    """A stack of `count` tiles of rows x columns."""

    count: int
    rows: int
    columns: int

    @property
    def chunks(self) -> int:
        return -(-self.columns // CHUNK)

    @property
    def scratch(self):
        return plgpu.SMEM((self.count, self.chunks, self.rows, CHUNK), jnp.float32, transforms=TRANSFORMS)

    def load(self, ref, source, index, row, head, n, barrier) -> None:
        """Starts filling tile n with rows from `row` of source[index, :, head]; arrives `chunks` times.

        What lies outside of the source becomes 0.
        """
        for c in range(self.chunks):
            columns = pl.ds(row * 0 + c * CHUNK, CHUNK)  # no constant: it may reach past the end
            plgpu.copy_gmem_to_smem(source.at[index, pl.ds(row, self.rows), head, columns], ref.at[n, c], barrier)


def fit(x: jax.Array, rows: int) -> jax.Array:
    """x [B, S, H, D] in float32, padded to what TMA takes: at least a box, columns in 16 bytes."""
    columns = max(CHUNK, 4 * -(-x.shape[3] // 4))
    pad = ((0, 0), (0, max(0, rows - x.shape[1])), (0, 0), (0, columns - x.shape[3]))
    return jnp.pad(x.astype(jnp.float32), pad)


def values(ref: Any, n, count: int) -> jax.Array:
    """Tiles n to n + count as [count rows, columns], for the interpreter."""
    x = ref[pl.ds(n, count)]
    return jnp.swapaxes(x, 1, 2).reshape(count * x.shape[2], -1)

"""Shared-memory tiles for wgmma, filled and emptied by TMA.

wgmma wants a tile of rows x columns stored as 8 x 64 blocks with 128-byte swizzle. A TMA descriptor of that
tiling can only start at a row that is a multiple of 8, in a tensor whose lengths are multiples of the
block: elsewhere it silently reads other rows. So a tile may have two views of the same bytes, both cut
into chunks of 64 columns: TMA goes through one that is swizzled but not tiled, and starts at any row;
wgmma goes through the tiled one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import Interpret

CHUNK = 64  # columns of 16 bits in a 128-byte swizzle
_SWIZZLE = (plgpu.SwizzleTransform(128),)
_TILED = (plgpu.TilingTransform((8, CHUNK)), *_SWIZZLE)


@dataclasses.dataclass(frozen=True)
class TileType:
    """A stack of `count` tiles of rows x columns. `any_row`: TMA may start at any row and end anywhere."""

    count: int
    rows: int
    columns: int
    dtype: Any
    any_row: bool
    interpret: Interpret = None

    @property
    def chunks(self) -> int:
        return self.columns // CHUNK if self.any_row else 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.count, self.chunks, self.rows, self.columns // self.chunks

    @property
    def scratch(self):
        tiled = plgpu.SMEM(self.shape, self.dtype, transforms=_TILED)
        if not self.any_row or self.interpret is not None:  # the interpreter has one layout
            return tiled
        return plgpu.RefUnion(plgpu.SMEM(self.shape, self.dtype, transforms=_SWIZZLE), tiled)

    def view(self, ref) -> Tiles:
        if not self.any_row or self.interpret is not None:
            return Tiles(self, ref, ref)
        return Tiles(self, *ref)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The views of a stack of tiles inside a kernel. `load` arrives `type.chunks` times at its barrier."""

    type: TileType
    copied: Any  # for TMA
    multiplied: Any  # for wgmma and registers

    def load(self, source, index, row, head, n, barrier) -> None:
        """Starts filling tile n with rows from `row` of source[index, :, head]."""
        for c in range(self.type.chunks):
            part = source.at[index, pl.ds(row, self.type.rows), head, self._columns(c)]
            plgpu.copy_gmem_to_smem(part, self.copied.at[n, c], barrier)

    def store(self, target, index, row, head, n) -> None:
        """Starts writing tile n to rows from `row` of target[index, :, head]; what lies outside is clipped."""
        for c in range(self.type.chunks):
            part = target.at[index, pl.ds(row, self.type.rows), head, self._columns(c)]
            plgpu.copy_smem_to_gmem(self.copied.at[n, c], part)

    def write(self, n, value) -> None:
        """Registers -> tile n."""
        width = self.type.columns // self.type.chunks
        for c in range(self.type.chunks):
            self.multiplied[n, c] = value[:, c * width : (c + 1) * width] if self.type.chunks > 1 else value

    def _columns(self, c: int):
        width = self.type.columns // self.type.chunks
        # A start that is not a constant: the last chunk may reach past the tensor, where TMA reads zeros.
        return pl.ds(lax.axis_index("wg") * 0 + c * width, width) if self.type.any_row else pl.ds(0, width)


def scores_product(acc, q: Tiles, m, k: Tiles, n) -> None:
    """acc += q[m] k[n]^T, by wgmma."""
    for c in range(k.type.chunks):
        plgpu.wgmma(acc, q.multiplied.at[m, c], k.multiplied.at[n, c].transpose((1, 0)))


def values_product(acc, weights, v: Tiles, n) -> int:
    """acc += weights v[n], by wgmma with weights in registers; returns how many wgmma groups it started."""
    width = v.type.columns // v.type.chunks
    for c in range(v.type.chunks):
        columns = acc if v.type.chunks == 1 else acc.at[:, pl.ds(c * width, width)]
        plgpu.wgmma(columns, weights, v.multiplied.at[n, c])
    return v.type.chunks


def supports(dtype) -> bool:
    return jnp.dtype(dtype).itemsize == 2

"""Shared-memory tiles for wgmma, filled and emptied by TMA.

wgmma wants a tile of rows x columns stored as 8 x 64 blocks with 128-byte swizzle. A TMA descriptor of that
tiling can only start at a row that is a multiple of 8, in a tensor whose lengths are multiples of the
block: elsewhere it silently reads other rows. So a tile may have two views of the same bytes, both cut
into chunks of 64 columns: TMA goes through one that is swizzled but not tiled, and starts at any row;
wgmma goes through the tiled one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import Interpret
from pallas_kernels.problem import AttentionProblem

CHUNK = 64  # columns of 16 bits in a 128-byte swizzle
_SWIZZLE = (plgpu.SwizzleTransform(128),)
TILED = (plgpu.TilingTransform((8, CHUNK)), *_SWIZZLE)


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
    def chunk(self) -> int:
        """Columns in a 128-byte swizzle."""
        return 128 // jnp.dtype(self.dtype).itemsize

    @property
    def chunks(self) -> int:
        return self.columns // self.chunk if self.any_row else 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.count, self.chunks, self.rows, self.columns // self.chunks

    @property
    def refs(self) -> tuple:
        """The one or two scratch refs to the same bytes that `view` takes."""
        tiled = plgpu.SMEM(self.shape, self.dtype, transforms=(plgpu.TilingTransform((8, self.chunk)), *_SWIZZLE))
        if not self.any_row or self.interpret is not None:  # the interpreter has one layout
            return (tiled,)
        return plgpu.SMEM(self.shape, self.dtype, transforms=_SWIZZLE), tiled

    @property
    def scratch(self):
        return plgpu.RefUnion(*self.refs) if len(self.refs) == 2 else self.refs[0]

    def view(self, ref) -> Tiles:
        if not self.any_row or self.interpret is not None:
            return Tiles(self, ref, ref)
        return Tiles(self, *ref)


class Ended(NamedTuple):
    """An array [B, S, heads, dim] in global memory, of which one block of rows is read from another, see `tails`."""

    whole: Any
    tail: Any  # [B, rows of a tile, heads, dim]: the block that starts at row `start`
    start: Any  # int32 [B|1] in global memory; `tails.of_entry` reads that of the one that is to be copied


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The views of a stack of tiles inside a kernel. `load` arrives `type.chunks` times at its barrier."""

    type: TileType
    copied: Any  # for TMA
    multiplied: Any  # for wgmma and registers

    def load(self, source, index, row, head, n, barrier, rows: Any = None, column=0, cluster=None) -> None:
        """Starts filling tile n, or some rows of it, with rows from `row` of source[index, :, head].

        Columns are those from `column` on. The CTAs along the axis `cluster` all ask for the same, and share the work.
        """
        rows = pl.ds(0, self.type.rows) if rows is None else rows

        def copy(source, row, c):
            part = source.at[index, pl.ds(row, rows.size), head, self._columns(c, row, column)]
            plgpu.copy_gmem_to_smem(part, self.copied.at[n, c, rows], barrier, collective_axes=cluster)

        def copies(source, row):
            # A loop: where these were unrolled beside one another, ptxas made other warps spill.
            lax.fori_loop(0, self.type.chunks, lambda c, _: copy(source, row, c), None)

        if isinstance(source, Ended):
            lax.cond(row < source.start, lambda: copies(source.whole, row), lambda: copies(source.tail, row * 0))
        else:
            for c in range(self.type.chunks):
                copy(source, row, c)

    def store(self, target, index, row, head, n, rows: Any = None, column=0) -> None:
        """Starts writing tile n, or some rows of it, to rows from `row` of target[index, :, head].

        What lies outside the tensor is clipped.
        """
        rows = pl.ds(0, self.type.rows) if rows is None else rows
        for c in range(self.type.chunks):
            part = target.at[index, pl.ds(row, rows.size), head, self._columns(c, row, column)]
            plgpu.copy_smem_to_gmem(self.copied.at[n, c, rows, pl.ds(0, self.width)], part)

    def write(self, n, value, rows=None) -> None:
        """Registers -> tile n, or some rows of it."""
        rows = pl.ds(0, self.type.rows) if rows is None else rows
        for c in range(self.type.chunks):
            part = value if self.type.chunks == 1 else value[:, c * self.width : (c + 1) * self.width]
            self.multiplied[n, c, rows, pl.ds(0, self.width)] = part

    def columns(self, n, start, width: int):
        """The view, for wgmma, of some columns of tile n."""
        if self.type.chunks == 1:
            return self.multiplied.at[n, 0, :, pl.ds(start, width)]
        assert width == CHUNK, f"{width} columns of a tile cut into chunks of {CHUNK}"
        return self.multiplied.at[n, start // CHUNK if isinstance(start, int) else lax.div(start, CHUNK)]

    @property
    def width(self) -> int:
        """Columns of a chunk."""
        return self.type.columns // self.type.chunks

    def _columns(self, c: int, row, column):
        if not self.type.any_row:
            return pl.ds(column, self.width)
        # A start that is not a constant: the last chunk may reach past the tensor, where TMA reads zeros.
        return pl.ds(row * 0 + column + c * self.width, self.width)


def transposed_product(acc, x: Tiles, m, y: Tiles, n, rows=None) -> int:
    """acc += x[m] y[n]^T, or some rows of x[m], by wgmma; returns how many wgmma groups it started."""
    for c in range(y.type.chunks):
        left = x.multiplied.at[m, c] if rows is None else x.multiplied.at[m, c, rows]
        plgpu.wgmma(acc, left, y.multiplied.at[n, c].transpose((1, 0)))
    return y.type.chunks


def product(acc, weights, y: Tiles, n) -> int:
    """acc += weights y[n], by wgmma with weights in registers; returns how many wgmma groups it started."""
    for c in range(y.type.chunks):
        columns = acc if y.type.chunks == 1 else acc.at[:, pl.ds(c * y.width, y.width)]
        plgpu.wgmma(columns, weights, y.multiplied.at[n, c])
    return y.type.chunks


def fit(x: jax.Array, rows: int) -> jax.Array:
    """x [B, S, H, D] padded to what TMA takes: at least the rows and columns of a box, columns in 16 bytes."""
    pad_rows, pad_columns = max(0, rows - x.shape[1]), fitted(x.shape[3]) - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, pad_rows), (0, 0), (0, pad_columns)))


def batch_entry(gmem, b):
    """The index of batch entry b in an array that may broadcast over the batch."""
    return 0 if gmem.shape[0] == 1 else b


def whole_blocks(x: jax.Array, block: int) -> jax.Array:
    """x [B, S] padded to whole blocks, for copies that do not stop at its end."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)))


def fitted(head_dim: int) -> int:
    """Columns of an array that `fit` has padded."""
    return max(CHUNK, 8 * -(-head_dim // 8))


def is_ragged(p: AttentionProblem) -> bool:
    """Whether the lengths or head dims are such that TMA needs a view of its own."""
    return any(n % 8 for n in (p.Sq, p.Sk)) or any(fitted(d) % CHUNK for d in (p.D, p.Dv))

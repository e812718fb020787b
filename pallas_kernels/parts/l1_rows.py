"""The rows of q and k in a backward of L1 attention: those that stay, 64 for a consumer, and those that pass by.

Either both are float32 (`l1_distances`, `l1_gradients`), or bfloat16 for the distances (`l1_maxima`) and integers in
the same order for the signs (`l1_signs`), with the sums of each row's features.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _compat, tiles
from pallas_kernels._compat import Interpret
from pallas_kernels.l1_tiles import L1BackwardTile
from pallas_kernels.parts import l1_distances, l1_gradients, l1_maxima, l1_signs, masking, softmax, swizzled_rows
from pallas_kernels.parts.swizzled_rows import RowsType


class Sums(NamedTuple):
    """What 64 rows that stay have so far."""

    d: jax.Array  # see l1_gradients and l1_signs
    ds: jax.Array  # [64], the sum of the ds that went into it


@dataclasses.dataclass(frozen=True)
class Rows:
    head_dim: int
    tile: L1BackwardTile
    interpret: Interpret

    @property
    def still(self) -> RowsType:
        return RowsType(self.tile.warpgroups, 64, self.head_dim, self._dtype)

    @property
    def passing(self) -> RowsType:
        return RowsType(self.tile.stages, self.tile.block, self.head_dim, self._dtype)

    @property
    def _dtype(self):
        return jnp.bfloat16 if self.tile.packed else jnp.float32

    @property
    def still_signs(self) -> RowsType:
        return RowsType(self.tile.warpgroups, 64, tiles.padded(self.head_dim))

    @property
    def passing_signs(self) -> RowsType:
        return RowsType(self.tile.stages, tiles.padded(self.head_dim), self.tile.block, jnp.int16)

    @property
    def out(self) -> RowsType:
        """What gradients leave through, float32."""
        return self.still_signs if self.tile.packed else self.still

    def inputs(self, still: jax.Array, passing: jax.Array) -> dict[str, jax.Array]:
        """The arrays for two of [B, S, H, D]."""
        t = self.tile
        x, y = swizzled_rows.crossed(self.still.fit(still, t.rows)), self.passing.fit(passing, t.block)
        if not t.packed:
            return {"still_gmem": x, "passing_gmem": y}
        return {
            "still_gmem": x,
            "passing_gmem": y,
            "still_signs_gmem": self.still_signs.fit(l1_signs.still(still), t.rows),
            "passing_signs_gmem": l1_signs.passing(passing),
            "still_sums_gmem": l1_maxima.row_sums(still, -(-still.shape[1] // t.rows) * t.rows),
            "passing_sums_gmem": l1_maxima.row_sums(passing, -(-passing.shape[1] // t.block) * t.block),
        }

    def out_type(self, inputs: dict[str, jax.Array]) -> jax.ShapeDtypeStruct:
        """Of the gradient of the rows that stay."""
        like = inputs["still_signs_gmem" if self.tile.packed else "still_gmem"]
        return jax.ShapeDtypeStruct(like.shape, jnp.float32)

    def scratch(self) -> dict[str, Any]:
        t = self.tile
        found = {"still_smem": self.still.scratch, "passing_smem": self.passing.scratch}
        if t.packed:
            found["still_signs_smem"] = self.still_signs.scratch
            found["passing_signs_smem"] = self.passing_signs.scratch
            found["still_sums_smem"] = plgpu.SMEM((t.warpgroups, 64), jnp.float32)
            found["passing_sums_smem"] = plgpu.SMEM((t.stages, t.block), jnp.float32)
        shape = l1_signs.MEMORY_SHAPE if t.packed else l1_gradients.memory_shape(t.block)
        found["ds_smem"] = plgpu.SMEM((t.warpgroups, *shape), jnp.float32)
        return found

    def copies(self) -> tuple[int, int]:
        """How often `load_still` and `load_passing` arrive at their barrier."""
        if not self.tile.packed:
            return self.still.chunks, self.passing.chunks
        signs = self.still_signs.chunks, self.passing_signs.chunks
        return self.still.chunks + signs[0] + 1, self.passing.chunks + signs[1] + 1

    def load_still(self, refs, b, row, head, wg, barrier) -> None:
        self.still.load(refs.still_smem, refs.still_gmem, b, row, head, wg, barrier)
        if self.tile.packed:
            self.still_signs.load(refs.still_signs_smem, refs.still_signs_gmem, b, row, head, wg, barrier)
            sums = refs.still_sums_gmem.at[b, head, pl.ds(row, 64)]
            plgpu.copy_gmem_to_smem(sums, refs.still_sums_smem.at[wg], barrier)

    def load_passing(self, refs, b, row, head, slot, barrier) -> None:
        self.passing.load(refs.passing_smem, refs.passing_gmem, b, row, head, slot, barrier)
        if self.tile.packed:
            signs = refs.passing_signs_smem, refs.passing_signs_gmem
            self.passing_signs.load(*signs, b, row * 0, head, slot, barrier, column=row)
            sums = refs.passing_sums_gmem.at[b, head, pl.ds(row, self.tile.block)]
            plgpu.copy_gmem_to_smem(sums, refs.passing_sums_smem.at[slot], barrier)

    def negative_distances(self, refs, wg, slot) -> jax.Array:
        """-d [64, block] of a consumer's rows and those in a slot."""
        operands = (refs.still_smem, wg, 1, refs.passing_smem, slot, self.interpret)
        if not self.tile.packed:
            return l1_distances.negative_distances(*operands)[0]
        (maxima,) = l1_maxima.sums_of_maxima(*operands)
        x_sums = _compat.load(refs.still_sums_smem.at[wg], softmax.ROWS)
        y_sums = _compat.load(refs.passing_sums_smem.at[slot], masking.COLUMNS)
        return l1_maxima.negative_distances(maxima, x_sums, y_sums)

    def start(self) -> Sums:
        head_dim = self.out.chunks * self.out.chunk
        return Sums(l1_gradients.start(head_dim), softmax.row_values(0.0, 64))

    def add(self, refs, sums: Sums, ds: jax.Array, wg, slot) -> Sums:
        """Adds what ds [64, block] gives."""
        if not self.tile.packed:
            x, y = (refs.still_smem, wg), (refs.passing_smem, slot)
            d = l1_gradients.add(sums.d, ds, refs.ds_smem.at[wg], *x, *y, self.interpret)
            return Sums(d, sums.ds + ds.sum(axis=1))
        rounded = ds.astype(jnp.bfloat16)
        x, y = (refs.still_signs_smem, wg), (refs.passing_signs_smem, slot)
        d = l1_signs.add(sums.d, rounded, *x, *y, self.interpret)
        return Sums(d, sums.ds + rounded.astype(jnp.float32).sum(axis=1))

    def finish(self, refs, sums: Sums, factor: float, wg) -> None:
        """Tile wg of `out_smem` becomes factor * sum_j ds_ij sign(x_iw - y_jw)."""
        finish = l1_signs.finish if self.tile.packed else l1_gradients.finish
        finish(sums.d, sums.ds, factor, refs.ds_smem.at[wg], self.out_smem(refs), wg, self.interpret)

    def out_smem(self, refs):
        return refs.still_signs_smem if self.tile.packed else refs.still_smem

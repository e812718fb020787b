"""A mask [B|1, H|1, Sq, Sk] and the entries, pairs of batch and head, that share it; its tiles in shared memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import tma
from pallas_kernels.problem import LinearProblem

_STAYS = 16 * 2**20  # bytes of a mask that L2 keeps anyway


@dataclasses.dataclass(frozen=True)
class Sharing:
    """`masks` masks, each read by `each` entries."""

    B: int
    H: int
    of_batch: int  # B or 1
    of_heads: int  # H or 1

    @property
    def masks(self) -> int:
        return self.of_batch * self.of_heads

    @property
    def each(self) -> int:
        return self.B * self.H // self.masks

    def mask(self, m) -> tuple[jax.Array, jax.Array]:
        """The indices of mask m."""
        return lax.div(m, jnp.int32(self.of_heads)), lax.rem(m, jnp.int32(self.of_heads))

    def entry(self, m, n) -> tuple[jax.Array, jax.Array]:
        """Batch and head of the n-th entry that reads mask m."""
        b, h = self.mask(m)
        heads = jnp.int32(self.H // self.of_heads)
        return b + lax.div(n, heads), h + lax.rem(n, heads)


def sharing(p: LinearProblem) -> Sharing:
    assert p.mask_shape is not None
    return Sharing(p.B, p.H, *p.mask_shape[:2])


def is_reread(p: LinearProblem, dtype) -> bool:
    """Whether L2 saves reads of the mask only for entries that are worked on side by side.

    Not where it keeps the whole mask anyway, or no two entries share it.
    """
    return sharing(p).each > 1 and p.Sq * p.Sk * jnp.dtype(dtype).itemsize > _STAYS


def operand_head(p: LinearProblem, gmem, h) -> jax.Array:
    """The head of an operand that belongs to output head h."""
    return lax.div(h, jnp.int32(p.H // gmem.shape[2]))


def in_memory(mask: jax.Array, dtype: str, rows: int, columns: int) -> jax.Array:
    """The mask as TMA takes it: 16 or 32 bits an element, whole blocks of the swizzle, at least one box."""
    if mask.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        mask = mask.astype(dtype if mask.dtype == bool else jnp.float32)
    chunk = 128 // mask.dtype.itemsize
    pads = (
        max(least, -(-n // block) * block) - n
        for n, block, least in zip(mask.shape[2:], (8, chunk), (rows, columns), strict=True)
    )
    return jnp.pad(mask, ((0, 0), (0, 0), *((0, pad) for pad in pads)))


def tile_type(stages: int, rows: int, columns: int, dtype, interpret: Interpret) -> tma.TileType:
    return tma.TileType(stages, rows, columns, jnp.dtype(dtype), False, interpret)


def load(tiles: tma.Tiles, source, index: tuple[jax.Array, jax.Array], row, column, slot, barrier) -> None:
    """Starts filling a tile from a row and column of source[index]; outside of it all is 0. Arrives once."""
    t = tiles.type
    part = source.at[*index, pl.ds(row, t.rows), pl.ds(column, t.columns)]
    plgpu.copy_gmem_to_smem(part, tiles.copied.at[slot, 0], barrier)

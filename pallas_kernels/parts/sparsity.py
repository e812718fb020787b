"""Tiles of scores that a mask or segment ids hide, wholly or in part.

Ahead of the kernel each tile of rows gets a list of the blocks where it sees something, with a mark at those of
which nothing is hidden. A mask comes as bits in the order in which wgmma's registers hold a tile. Rows are queries
or keys, as the kernel has it. An axis over which the mask broadcasts has one block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import _compat
from pallas_kernels._compat import Interpret
from pallas_kernels.parts import masking, ranges, wgmma_layout
from pallas_kernels.parts.masking import WGMMA
from pallas_kernels.parts.ranges import Range
from pallas_kernels.parts.schedule import Work
from pallas_kernels.problem import AttentionArrays, AttentionProblem, L1Problem

_WORD = 32  # scores of one thread in a tile of 64 x 64
_THREADS = 128


def is_listed(p: AttentionProblem) -> bool:
    """Whether a problem's tiles walk by lists. The L1 kernels walk whole ranges."""
    return (p.mask_shape is not None or p.segments) and not isinstance(p, L1Problem)


def by_query(p: AttentionProblem, a: AttentionArrays, rows: int, block_kv: int) -> dict[str, jax.Array]:
    """Lists of key blocks [B|1, H|1, query tiles, 1 + key blocks], and bits, for tiles of rows x block_kv."""
    if not is_listed(p):
        return {}
    a = _opaque(a)
    found = {"listed_gmem": _lists(*_seen(p, a, rows, block_kv))}
    if a.mask is not None:
        found["bits_gmem"] = _packed(a.mask, rows, block_kv)
    return found


def by_key(p: AttentionProblem, a: AttentionArrays, rows: int, block_q: int) -> dict[str, jax.Array]:
    """Lists of query blocks, head after head of a group, [B|1, Hk|1, key tiles, 1 + group query blocks], and bits."""
    if not is_listed(p):
        return {}
    a = _opaque(a)
    found = {"listed_gmem": _lists(*(_of_group(p, x) for x in _seen(p, a, block_q, rows)))}
    if a.mask is not None:
        found["bits_gmem"] = _packed(jnp.swapaxes(a.mask, 2, 3), rows, block_q)
    return found


def scratch(p: AttentionProblem, stages: int, rows: int, columns: int) -> dict[str, Any]:
    if p.mask_shape is None:
        return {}
    return {"bits_smem": plgpu.SMEM((stages, rows // 64, columns // 64, _THREADS), jnp.int32)}


def copies(p: AttentionProblem) -> int:
    """How often `load` arrives at its barrier."""
    return int(p.mask_shape is not None)


def load(refs, b, h, row_block, column_block, slot, barrier) -> None:
    """Starts to copy the bits of a tile."""
    if refs.bits_gmem is not None:
        tile = _entry(refs.bits_gmem, b, h, row_block, column_block)
        plgpu.copy_gmem_to_smem(refs.bits_gmem.at[tile], refs.bits_smem.at[slot], barrier)


class Visits(NamedTuple):
    """The blocks of a tile of rows: those of a range, last first, or those of its list."""

    range: Range
    steps: Any
    lists: Any = None
    row: tuple = ()

    def at(self, step) -> tuple[jax.Array, jax.Array | None]:
        """The number of a step's block, and whether its list says that nothing of it is hidden."""
        if self.lists is None:
            return self.range.hi - 1 - step, None
        entry = self.lists[(*self.row, 1 + step)]
        return lax.div(entry, jnp.int32(2)), lax.rem(entry, jnp.int32(2)) == 1


def visits(p: AttentionProblem, refs, work: Work, found: Range, least: int = 0) -> Visits:
    """The blocks of a tile, whose range is known; the first block again if there are less than `least`."""
    if not is_listed(p):
        return Visits(found, found.hi - found.lo)
    row = _entry(refs.listed_gmem, work.b, work.h, work.block)
    return Visits(found, jnp.maximum(refs.listed_gmem[(*row, 0)], least), refs.listed_gmem, row)


def read(refs, slot, part) -> jax.Array | None:
    """The bits of the 64 rows of that number in registers."""
    if refs.bits_smem is None:
        return None
    words = refs.bits_smem.at[slot, part]
    return _compat.load(words, _layout(words.shape))


def order(features: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The longest lists first, see `schedule.placed`; nothing where there are none."""
    if "listed_gmem" not in features:
        return {}
    lengths = features["listed_gmem"][..., 0].sum(axis=1)
    return {"order_gmem": ranges.longest_first(jnp.zeros_like(lengths), lengths)}


def hide(s: jax.Array, bits, row_ids, column_ids, interpret: Interpret) -> jax.Array:
    """-inf where the bit of a score is 0 or its ids differ."""
    if bits is not None:
        s = _hide_by_bits(s, bits, interpret)
    return s if row_ids is None else masking.hide_other_segments(s, row_ids, column_ids)


def _opaque(a: AttentionArrays) -> AttentionArrays:
    """XLA takes minutes to compute on a mask that is a constant."""
    return a._replace(mask=lax.optimization_barrier(a.mask))


def _seen(p: AttentionProblem, a: AttentionArrays, rows: int, block_kv: int) -> tuple[jax.Array, jax.Array]:
    """Which tiles of rows x block_kv may show something, and of which the lists hide nothing: [B|1, H|1, nq, nk]."""
    blocks = -(-p.Sk // block_kv)
    if a.key_ranges is None:
        reach = ranges.key_blocks(p, jnp.arange(-(-p.Sq // rows)) * rows, rows, block_kv)
        lo, hi = (jnp.broadcast_to(x, (1, -(-p.Sq // rows))) for x in (reach.lo, reach.hi))
    else:
        table = ranges.table(a.key_ranges, rows, block_kv, p.Sk)
        lo, hi = table[..., 0], table[..., 3]
    block = jnp.arange(blocks)
    some = ((lo[..., None] <= block) & (block < hi[..., None]))[:, None]
    whole = jnp.ones_like(some)
    if a.mask is not None:
        tiles = _in_tiles(a.mask, rows, block_kv, mode="edge")
        some, whole = some & tiles.any(axis=(3, 5)), whole & tiles.all(axis=(3, 5))
    if a.q_segment_ids is not None and a.kv_segment_ids is not None:
        q = ranges.in_blocks(a.q_segment_ids, rows)[:, None, :, None]
        k = ranges.in_blocks(a.kv_segment_ids, block_kv)[:, None, None]
        (q_lo, q_hi), (k_lo, k_hi) = ((x.min(axis=4), x.max(axis=4)) for x in (q, k))
        some, whole = some & (q_lo <= k_hi) & (k_lo <= q_hi), whole & (q_lo == k_hi) & (k_lo == q_hi)
    return some, jnp.broadcast_to(whole, some.shape)


def _of_group(p: AttentionProblem, x: jax.Array) -> jax.Array:
    """[B|1, H|1, nq, nk] -> [B|1, Hk|1, nk, group nq]."""
    heads = (p.Hk, p.group) if x.shape[1] == p.H else (1, 1)
    x = x.reshape(x.shape[0], *heads, *x.shape[2:])
    x = jnp.broadcast_to(x, (*x.shape[:2], p.group, *x.shape[3:]))
    return jnp.moveaxis(x, 4, 2).reshape(*x.shape[:2], x.shape[4], -1)


def _lists(some: jax.Array, whole: jax.Array) -> jax.Array:
    """How many along the last axis, then which: 2 n, or 2 n + 1 where whole; int32. The rest is 0."""
    end = 2 * some.shape[-1]
    entries = jnp.sort(jnp.where(some, 2 * jnp.arange(some.shape[-1]) + whole, end), axis=-1)
    entries = jnp.where(entries < end, entries, 0)
    return jnp.concatenate([some.sum(axis=-1, keepdims=True), entries], axis=-1).astype(jnp.int32)


def _in_tiles(mask: jax.Array, rows: int, columns: int, **padding) -> jax.Array:
    """[B|1, H|1, R|1, C|1] -> [B|1, H|1, tiles, rows, tiles, columns], 1 tile of 1 where an axis broadcasts."""
    r, c = (1 if length == 1 else size for length, size in zip(mask.shape[2:], (rows, columns), strict=True))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -mask.shape[2] % r), (0, -mask.shape[3] % c)), **padding)
    return mask.reshape(*mask.shape[:2], mask.shape[2] // r, r, mask.shape[3] // c, c)


def _packed(mask: jax.Array, rows: int, columns: int) -> jax.Array:
    """Bits [B|1, H|1, row tiles|1, column tiles|1, rows / 64, columns / 64, 128 threads], int32."""
    tiles = _in_tiles(mask, rows, columns)
    B, H, n, _, m, _ = tiles.shape
    tiles = jnp.broadcast_to(tiles, (B, H, n, rows, m, columns))
    # warp, half of its rows, lane / 4; 64 columns, 8 columns, lane % 4, one of a pair
    tiles = tiles.reshape(B, H, n, rows // 64, 4, 2, 8, m, columns // 64, 8, 4, 2)
    tiles = tiles.transpose(0, 1, 2, 7, 3, 8, 4, 6, 10, 9, 5, 11)
    tiles = tiles.reshape(B, H, n, m, rows // 64, columns // 64, _THREADS, _WORD)
    words = (tiles.astype(jnp.uint32) << jnp.arange(_WORD, dtype=jnp.uint32)).sum(axis=-1, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.int32)


def _unpacked(bits: jax.Array) -> jax.Array:
    """Bits [columns / 64, 128] of 64 rows -> bool [64, columns]."""
    tile = (bits[:, :, None] >> jnp.arange(_WORD)) & 1
    tile = tile.reshape(-1, 4, 8, 4, 8, 2, 2).transpose(1, 5, 2, 0, 4, 3, 6)
    return tile.reshape(64, -1) == 1


def _hide_by_bits(s: jax.Array, bits: jax.Array, interpret: Interpret) -> jax.Array:
    if interpret is not None:
        return jnp.where(_unpacked(bits), s, -jnp.inf)
    call = plgpu.inline_mgpu(
        arg_types=(WGMMA, _layout(bits.shape)), return_type=plgpu.ShapeDtypeStruct(s.shape, s.dtype, WGMMA)
    )
    return call(_hide_where_0)(s, bits)


def _hide_where_0(_, s, bits):
    words = [wgmma_layout.scalar(x) for x in bits.registers.flat]
    hidden, none = wgmma_layout.real(-float("inf")), wgmma_layout.integer(0)

    def element(index, e, column, row):
        word, bit = divmod(4 * (column // 8) + 2 * row + e, _WORD)
        seen = arith.andi(words[word], wgmma_layout.integer(1 << bit))
        seen = arith.cmpi(arith.CmpIPredicate.ne, seen, none)
        return arith.select(seen, wgmma_layout.scalar(s.registers[index], e), hidden)

    return wgmma_layout.tile(s.shape, element)


def _layout(shape: tuple[int, ...]):
    return plgpu.Layout.WG_STRIDED(tuple(shape), vec_size=1)


def _entry(gmem, *index) -> tuple:
    """An index into leading axes of which some may broadcast."""
    return tuple(0 if length == 1 else n for length, n in zip(gmem.shape, index, strict=False))

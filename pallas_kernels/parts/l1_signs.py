"""The way back through L1 distances of bfloat16 rows: sums of ds_ij sign(x_iw - y_jw) over j, on the tensor cores.

Integers that are in order where the numbers are give two signs by one instruction, and exactly at a tie:

    min(max((x + 1) + (-y), 0), 2) = sign(x - y) + 1

Bfloat16s with these bits are 0, 2^-133 and 2^-132; a multiplication makes them 0, 2^-6 and 2^-5. For a row x_i, 16 of
its features and 16 rows y_j they are the left operand of mma.m16n8k16, and the right one has ds_ij, in bfloat16, in
the column of i and zeros elsewhere, so that the results of eight rows of x fill one accumulator. wgmma's layout
already has every ds where that operand wants it.

The integers are of 15 bits, so that a difference fits in 16: numbers beyond 2^33, and within 2^-95 of 0, tie.
"""

from __future__ import annotations

# inline_mgpu supplies the first argument of what it decorates.
# pyright: reportCallIssue=false
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import l1_maxima, ptx, swizzled_rows, wgmma_layout
from pallas_kernels.parts.swizzled_rows import TRANSFORMS, over
from pallas_kernels.parts.wgmma_layout import integer

WGMMA = plgpu.Layout.WGMMA
MEMORY_SHAPE = (1, 64)  # of the float32 memory that `finish` wants
BLOCK = 64  # features, and rows of y, of a pass
_UNIT = 2.0**-6  # of the sums
_SMALLEST, _LARGEST = 32 << 7, (1 << 14) - 1  # the bits of 2^-95, and how many there are above them


def still(x: jax.Array) -> jax.Array:
    """x [B, S, H, D] as what `add` takes as x: pairs of x + 1 in float32's bits, D in blocks of 64.

    A thread reads four features at once, so a block's come in the order 0, 8, 16, 24, 1, 9, ..., then the other half;
    and `crossed`.
    """
    pair = (_integers(_whole(x, 3)) + 1) & 0xFFFF
    pair = pair | pair << 16
    blocks = pair.reshape(*pair.shape[:3], -1, 4, 8).swapaxes(-1, -2)
    return swizzled_rows.crossed(lax.bitcast_convert_type(blocks.reshape(pair.shape), jnp.float32))


def passing(y: jax.Array) -> jax.Array:
    """y [B, S, H, D] as what `add` takes as y: int16 -y [B, D, H, S], D and S in blocks of 64."""
    return jnp.swapaxes(-_integers(_whole(_whole(y, 1), 3)), 1, 3).astype(jnp.int16)


def _whole(x: jax.Array, axis: int) -> jax.Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % BLOCK)
    return jnp.pad(x, pad)


def _integers(x: jax.Array) -> jax.Array:
    """Bfloat16 -> int32 in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32)
    size = jnp.clip((bits & 0x7FFF) - _SMALLEST, 0, _LARGEST)
    return jnp.where(bits > 0x7FFF, -size, size)


def add(sums: jax.Array, ds: jax.Array, x_ref, m, y_ref, n, interpret: Interpret) -> jax.Array:
    """Adds ds [64, 64], bfloat16, times sign + 1, over the rows of tile n of y, for tile m of x.

    The sums [64, D] are in units and in an order of this module.
    """
    if interpret is not None:
        signs = jnp.clip(_of_memory(x_ref[m])[:, :, None] + y_ref[n, 0].astype(jnp.int32), 0, 2)
        return sums + _UNIT * (ds.astype(jnp.float32)[:, None] * signs).sum(axis=-1)
    rows = plgpu.RefType(TRANSFORMS)
    call = plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA, rows, rows),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, WGMMA),
    )
    return call(_add)(sums, ds, x_ref.at[m], y_ref.at[n])


def _of_memory(x: jax.Array) -> jax.Array:
    """A tile of `still` [chunks, 64, 32] -> x + 1 [64, D]."""
    x = jnp.swapaxes(lax.bitcast_convert_type(swizzled_rows.crossed(x), jnp.int32) >> 16, 0, 1)
    return x.reshape(64, -1, 8, 4).swapaxes(-1, -2).reshape(64, -1)


def finish(sums: jax.Array, ds_sums: jax.Array, factor: float, memory, x_ref, m, interpret: Interpret) -> None:
    """Tile m of x becomes factor * sum_j ds_ij sign(x_iw - y_jw), w in order; ds_sums [64] is sum_j ds_ij."""
    if interpret is not None:
        result = factor * (sums / _UNIT - ds_sums[:, None])
        x_ref[m] = jnp.swapaxes(result.reshape(64, -1, 32), 0, 1)
        return
    memory[0] = ds_sums
    plgpu.commit_smem()
    call = plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(), plgpu.RefType(TRANSFORMS)))
    call(lambda _, sums, memory, x_ref: _finish(factor, sums, memory, x_ref))(sums, memory, x_ref.at[m])


def _add(_, sums, ds, x_ref, y_ref):
    i32 = ir.IntegerType.get_signless(32)
    weights = [llvm.bitcast(i32, register) for register in ds.registers.flat]  # by 8 columns, then by 8 rows
    totals = wgmma_layout.scalars(sums)
    for block, half in itertools.product(range(sums.shape[1] // BLOCK), range(2)):
        here = slice(32 * block, 32 * (block + 1))
        totals[here] = _add_half(block, half, totals[here], weights[8 * half :][:8], x_ref, y_ref)
    return wgmma_layout.tile(sums.shape, lambda _, e, column, r: totals[4 * (column // 8) + 2 * r + e])


def _add_half(block: int, half: int, totals: list[ir.Value], weights: list[ir.Value], x_ref, y_ref) -> list[ir.Value]:
    """For a block of features and 32 rows of y, in registers: a loop over rows n and n + 8 of a warp's 16."""
    warp, lane = swizzled_rows.thread()
    y = [[_read_matrices(y_ref, BLOCK * block + 16 * c, 2 * half + j, lane) for c in range(4)] for j in range(2)]
    two, scale = integer(0x00020002), integer(0x7F007F00)

    @utils.fori(integer(8), totals)
    def done(n, totals):
        totals = list(totals)
        row = arith.addi(arith.muli(warp, integer(16)), n)
        chosen = arith.cmpi(arith.CmpIPredicate.eq, over(lane, 4), n)
        right = [arith.select(chosen, weight, integer(0)) for weight in weights]
        starts = [swizzled_rows.pointer(x_ref, integer(2 * block + h), row, over(lane, 4)) for h in range(2)]
        x = [
            [each for start in starts for each in swizzled_rows.read(swizzled_rows.below(start, 8 * r), two.type, True)]
            for r in range(2)
        ]
        for j, r, c in itertools.product(range(2), range(2), range(4)):
            at = slice(16 * r + 4 * c, 16 * r + 4 * c + 4)
            left = [_signs(x[r][2 * c + part % 2], y[j][c][part], two, scale) for part in range(4)]
            ds = right[4 * j + r], right[4 * j + 2 + r]
            totals[at] = l1_maxima.multiply(left, ds, totals[at], "bfloat16")
        return totals

    return list(done.results)


def _read_matrices(ref, row: int, j: int, lane) -> list[ir.Value]:
    """16 features from `row` on of rows 16 j to 16 j + 15 of y: a left operand of mma.m16n8k16."""
    of_lane = arith.addi(arith.remui(lane, integer(8)), arith.muli(arith.remui(over(lane, 8), integer(2)), integer(8)))
    start = swizzled_rows.pointer(ref, integer(0), of_lane, arith.addi(integer(2 * j), over(lane, 16)))
    i32 = ir.IntegerType.get_signless(32)
    address = llvm.ptrtoint(i32, swizzled_rows.below(start, row))
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    return ptx.results(i32, 4, text, [address], "=r,=r,=r,=r,r", stays=True)


def _signs(x: ir.Value, y: ir.Value, two: ir.Value, scale: ir.Value) -> ir.Value:
    """(sign + 1) 2^-6 of two pairs."""
    text = "{ .reg .b32 t; add.s16x2 t, $1, $2; min.relu.s16x2 t, t, $3; mul.rn.bf16x2 $0, t, $4; }"
    return ptx.result(x.type, text, [x, y, two, scale], "=r,r,r,r,r")


def _finish(factor: float, sums, memory, x_ref) -> None:
    """A thread has rows 2 (lane % 4) + {0, 1} of each eight, and features lane / 4 of each eight."""
    warp, lane = swizzled_rows.thread()
    eighth, first = over(lane, 4), arith.muli(arith.remui(lane, integer(4)), integer(2))
    totals = wgmma_layout.scalars(sums)
    for r in range(2):
        for e in range(2):
            row = arith.addi(arith.muli(warp, integer(16)), arith.addi(first, integer(8 * r + e)))
            at = swizzled_rows.moved(utils.memref_ptr(memory), arith.muli(row, integer(4)))
            less = llvm.load(ir.F32Type.get(), at, alignment=4)
            for n in range(sums.shape[1] // 8):
                block, part = divmod(n, 8)
                total = totals[32 * block + 16 * r + 4 * (part // 2) + 2 * (part % 2) + e]
                result = arith.subf(arith.mulf(total, wgmma_layout.real(1 / _UNIT)), less)
                unit = arith.addi(integer(2 * (n % 4)), over(eighth, 4))
                start = swizzled_rows.pointer(x_ref, integer(n // 4), row, unit)
                start = swizzled_rows.moved(start, arith.muli(arith.remui(eighth, integer(4)), integer(4)))
                llvm.store(arith.mulf(result, wgmma_layout.real(factor)), start, alignment=4)

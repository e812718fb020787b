"""L1 distances of a tile of pairs, on the CUDA cores, in wgmma's register layout.

A thread has two rows of each 64 and all the columns 8 j + 2 (lane % 4) + {0, 1}. It reads four features of its
rows and columns at a time, in 16 bytes each. A feature of a pair costs two additions: |x| is free in an operand.
"""

from __future__ import annotations

# inline_mgpu supplies the first argument of what it decorates.
# pyright: reportCallIssue=false
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf, vector
from jaxlib.mlir.dialects import math as math_dialect

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import float_rows, wgmma_layout
from pallas_kernels.parts.float_rows import CHUNK, TRANSFORMS

WGMMA = plgpu.Layout.WGMMA
_WIDTH = 4  # features of a read
_READS = CHUNK // _WIDTH  # of a chunk
_ROW = 128  # bytes of a row of a chunk


def negative_distances(x_ref, first, count: int, y_ref, n, interpret: Interpret) -> list[jax.Array]:
    """-sum_w |x_iw - y_jw| for the rows of tiles first, first + 1, ... of x against those of tile n of y.

    x_ref: tiles of 64 rows (see `float_rows`). Returns `count` arrays float32 [64, rows of y] in wgmma's layout.
    """
    columns = y_ref.shape[2]
    if interpret is not None:
        x, y = float_rows.values(x_ref, first, count), float_rows.values(y_ref, n, 1)
        d = -jnp.abs(x[:, None] - y[None]).sum(axis=-1)
        return [d[64 * m : 64 * (m + 1)] for m in range(count)]
    result = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, WGMMA)
    reference = plgpu.RefType(TRANSFORMS)
    call = plgpu.inline_mgpu(arg_types=(reference, reference), return_type=[result] * count)
    x_tiles = [x_ref.at[first + m] for m in range(count)]
    call = plgpu.inline_mgpu(arg_types=(*[reference] * count, reference), return_type=[result] * count)
    return call(functools.partial(_distances, columns))(*x_tiles, y_ref.at[n])


def _distances(columns: int, _, *refs):
    """A loop over reads of four features; the sums of a thread go round with it."""
    *x_refs, y_ref = refs
    chunks, rows = ir.MemRefType(y_ref.type).shape[0], ir.MemRefType(x_refs[0].type).shape[1]
    thread = arith.remui(_thread(), _int(128))
    row = arith.addi(arith.muli(_over(thread, 32), _int(16)), _over(arith.remui(thread, _int(32)), 4))
    pair = arith.muli(arith.remui(thread, _int(4)), _int(2))
    x_starts = [(utils.memref_ptr(x), row, 8) for x in x_refs]
    sums = [[_real(0.0)] * (columns // 4 * 2) for _ in x_refs]
    loop = utils.fori(_int(chunks * _READS), sums)

    @loop
    def done(step, sums):
        chunk, read = _over(step, _READS), arith.remui(step, _int(_READS))
        found = []
        xs = [[_read(start, chunk, rows, row, read, 8 * r) for r in range(2)] for start, row, _ in x_starts]
        totals = [list(s) for s in sums]
        y = utils.memref_ptr(y_ref)
        for j in range(columns // 8):
            for e in range(2):
                near = _read(y, chunk, columns, arith.addi(pair, _int(e)), read, 8 * j)
                for m, x in enumerate(xs):
                    for r in range(2):
                        at = 4 * j + 2 * r + e
                        totals[m][at] = arith.subf(totals[m][at], _size(x[r], near))
        del found
        return totals

    return [_tile(columns, s) for s in done.results]

"""Named barriers, fences and warp roles: what Mosaic GPU reaches only through PTX.

Each has a second form that the CPU interpreter understands, so that a kernel is written once.
"""

from __future__ import annotations

from collections.abc import Callable

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels._compat import Interpret

_FIRST_ID = 4  # Mosaic GPU uses the low ones itself; a CTA has 16


def sync(barrier: int, threads: int) -> None:
    """Waits until `threads` threads have reached the named barrier, by sync or by arrive."""
    _bar("sync", _FIRST_ID + barrier, threads)


def arrive(barrier: int, threads: int) -> None:
    """Counts as having reached the named barrier, without waiting."""
    _bar("arrive", _FIRST_ID + barrier, threads)


def take_turn(turn, wg, count: int, interpret: Interpret) -> None:
    """Waits for this warpgroup's turn. Turns go round `count` warpgroups, each given by `give_turn`."""
    if count == 1:
        return
    if interpret is not None:
        plgpu.barrier_wait(turn.at[wg])
    else:
        sync(wg, 256)


def give_turn(turn, wg, count: int, interpret: Interpret) -> None:
    """Gives the turn to warpgroup `wg`."""
    if count == 1:
        return
    if interpret is not None:
        plgpu.barrier_arrive(turn.at[wg])
    else:
        arrive(wg, 256)


def turn_scratch(count: int, interpret: Interpret) -> list:
    """Scratch for `take_turn`: none on the GPU, where the barriers are named."""
    return [plgpu.Barrier(num_barriers=count)] if interpret is not None and count > 1 else []


def in_one_warp(role: Callable[[], None], interpret: Interpret) -> None:
    """Runs a role of copies, barriers and scalars in the first warp of this warpgroup."""
    if interpret is not None:
        role()
        return

    @plgpu.warp_map
    def _(warp):
        pl.when(warp == 0)(role)


def _bar(op: str, barrier, threads: int) -> None:
    void = "!llvm.void"
    if isinstance(barrier, int):

        @plgpu.inline_mgpu()
        def fixed(_):
            text = f"bar.{op} {barrier}, {threads};"
            llvm.inline_asm(ir.Type.parse(void), [], text, "", has_side_effects=True)

        fixed()
    else:

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
        def dynamic(_, index):
            text = f"bar.{op} $0, {threads};"
            llvm.inline_asm(ir.Type.parse(void), [index.registers[()]], text, "r", has_side_effects=True)

        dynamic(barrier)


def next_in_turn(wg, count: int):
    """The warpgroup after wg."""
    return lax.rem(wg + 1, count)

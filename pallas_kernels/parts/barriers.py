"""Named barriers and warp roles: what Mosaic GPU reaches only through PTX.

Each has a second form that the CPU interpreter understands, so that a kernel is written once.
"""

from __future__ import annotations

# inline_mgpu supplies the first argument of what it decorates.
# pyright: reportCallIssue=false
import dataclasses
from collections.abc import Callable, Sequence

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._compat import Interpret
from pallas_kernels.parts import ptx

_FIRST_ID = 5  # Mosaic GPU takes one for each warpgroup, from 1 on, of at most 4; a CTA has 16


@dataclasses.dataclass(frozen=True)
class NamedBarrier:
    """`count` hardware barriers from `index` on, each complete when `threads` threads have reached it.

    `ref` is the scratch: the interpreter waits on it, the GPU on the named barrier.
    """

    index: int
    threads: int
    count: int = 1
    meeting: int = 1  # warpgroups that `meet`
    interpret: Interpret = None

    @property
    def scratch(self):
        return plgpu.Barrier(num_arrivals=self.meeting, num_barriers=self.count)

    def wait(self, ref, n=0) -> None:
        """Reaches barrier n and waits until it is complete."""
        if self.interpret is not None:
            plgpu.barrier_wait(ref.at[n])
        else:
            _bar("sync", _FIRST_ID + self.index + n, self.threads)

    def arrive(self, ref, n=0) -> None:
        """Reaches barrier n without waiting."""
        if self.interpret is not None:
            plgpu.barrier_arrive(ref.at[n])
        else:
            _bar("arrive", _FIRST_ID + self.index + n, self.threads)

    def meet(self, ref) -> None:
        """All `meeting` warpgroups wait for each other."""
        if self.interpret is not None:
            plgpu.barrier_arrive(ref.at[0])
        self.wait(ref)


def turns(consumers: int, interpret: Interpret) -> NamedBarrier:
    """Whose turn at the tensor cores it is: one barrier a consumer, between it and the one before it."""
    return NamedBarrier(index=0, threads=256, count=consumers, interpret=interpret)


def warpgroups(consumers: int, roles: int, interpret: Interpret) -> int:
    """Warpgroups to launch: roles share one, but the interpreter has no warps and gives each its own."""
    return consumers + (roles if interpret is not None else 1)


def in_warps(roles: Sequence[Callable[[], None]], index, interpret: Interpret) -> None:
    """Runs roles of copies, barriers and scalars side by side, one warp each.

    `index` counts the warpgroups that are not consumers; on the GPU there is one.
    """
    if interpret is not None:
        for n, role in enumerate(roles):
            pl.when(index == n)(role)
        return

    @plgpu.warp_map
    def _(warp):
        for n, role in enumerate(roles):
            pl.when(warp == n)(role)


def fence(interpret: Interpret) -> None:
    """Orders this thread's accesses to shared memory before later ones by TMA or wgmma that a barrier admits."""
    if interpret is not None:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()
    def proxy(_):
        ptx.effect("fence.proxy.async.shared::cta;", [], "")

    proxy()


def pin(step, steps, interpret: Interpret) -> None:
    """Keeps arithmetic that stands before this point from being moved behind it; step < steps must hold.

    ptxas moves what stands ahead of a wait for a product behind it, out of the product's shadow, but not over a branch
    that it takes for possible.
    """
    if interpret is not None:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def branch(_, *operands):
        text = "{ .reg .pred p; setp.ge.s32 p, $0, $1; @p nanosleep.u32 32; }"
        ptx.effect(text, [x.registers[()] for x in operands], "r,r")

    branch(step, steps)


def following(wg, count: int):
    """The warpgroup after wg, in a circle."""
    return lax.rem(wg + 1, count)


def _bar(op: str, barrier, threads: int) -> None:
    if isinstance(barrier, int):

        @plgpu.inline_mgpu()
        def fixed(_):
            ptx.effect(f"bar.{op} {barrier}, {threads};", [], "")

        fixed()
    else:

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
        def dynamic(_, index):
            ptx.effect(f"bar.{op} $0, {threads};", [index.registers[()]], "r")

        dynamic(barrier)

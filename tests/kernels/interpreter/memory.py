"""Memory and barriers of the interpreter: fewer false alarms."""

from __future__ import annotations

import functools

from jax._src.pallas.mosaic.interpret import race_detection_state
from jax._src.pallas.mosaic_gpu import core as mosaic_core
from jax._src.pallas.mosaic_gpu.interpret import shared_memory

REGISTERS = list(mosaic_core.MemorySpace).index(mosaic_core.MemorySpace.REGS)


def in_registers(key) -> bool:
    return getattr(key, "memory_space_id", None) == REGISTERS


def _except_registers(check):
    """Registers are private to a thread, and their ids recur from one grid point to the next."""

    @functools.wraps(check)
    def checked(self, *args, **kwargs):
        if any(map(in_registers, (*args, *kwargs.values()))):
            return None
        return check(self, *args, **kwargs)

    return checked


def _deallocate(self) -> None:
    """A barrier may go with phases that nobody observed, as in JAX 0.12, but not with arrivals pending."""
    with self.cv:
        self.ref_count -= 1
        if self.ref_count == 0 and self.arrivals_count != 0:
            raise ValueError(f"a barrier went with {self.arrivals_count} arrivals pending")


@functools.cache
def install() -> None:
    races = race_detection_state.RaceDetectionState
    races.check_read = _except_registers(races.check_read)
    races.check_write = _except_registers(races.check_write)
    if not hasattr(shared_memory.Barrier, "observed_phases"):
        shared_memory.Barrier.deallocate = _deallocate

"""JAX's interpreter of Mosaic GPU kernels, completed with what attention kernels need. No JAX file is edited.

`params()` goes to a kernel's `interpret=`. On JAX 0.12 a race raises; on 0.11 it only sets `found_races()`;
0.10 sees few races, but numbers and barriers are checked on all three.
"""

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from tests.kernels.interpreter import copies, dispatch, memory, products


def params() -> InterpretGPUParams:
    dispatch.install()
    memory.install()
    products.install()
    copies.install()
    return InterpretGPUParams(detect_races=True)


def reset() -> None:
    """Forgets the memory and the races of earlier kernels; also needed after an exception."""
    gpu_callbacks.reset_gpu_interpret_mode_state()


def found_races() -> bool:
    races = interpret_pallas_call.get_races()
    return races is not None and races.races_found

"""Everything that drifts between JAX 0.10, 0.11 and 0.12, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Whether a tile of 16-bit elements may be read transposed, from shared memory into registers.
TRANSPOSED_LOADS = jax.__version_info__ >= (0, 11)

# Set by tests: an InterpretGPUParams runs a kernel on the CPU, None compiles it.
Interpret = Any


def kernel(
    body: Callable,
    *,
    name: str,
    out_type: Any,
    scratch: Mapping[str, Any],
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    warpgroups: int,
    cluster: Mapping[str, int] | None = None,
    interpret: Interpret = None,
) -> Callable:
    """body(*inputs, *outputs, **scratch) as a function of the inputs; an `accumulator` is updated in place.

    cluster: names and sizes of the axes of a cluster, of which the grid then counts.

    Wgmma, fences and barriers are placed by hand in these kernels, so automatic ones are off; the lowering
    semantics are pinned because their default changed in 0.11.
    """

    def with_scratch(*refs):
        pl.run_scoped(lambda **s: body(*refs, **s), collective_axes="wg", **scratch)

    mesh = plgpu.Mesh(
        grid=grid,
        grid_names=grid_names,
        cluster=tuple((cluster or {}).values()),
        cluster_names=tuple(cluster or ()),
        num_threads=warpgroups,
        thread_name="wg",
    )
    params = plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=0,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )
    launch = pl.kernel(
        with_scratch,
        out_type=out_type,
        mesh=mesh,
        compiler_params=params,
        interpret=False if interpret is None else interpret,
        name=name,
    )
    if interpret is not None:
        return launch
    # Without it XLA fuses a kernel with an update of its result, out.at[0].set(0), and fails to compile that.
    return lambda *arrays: lax.optimization_barrier(launch(*arrays))


def accumulator(x: jax.Array):
    """A buffer that a kernel adds into; read it back with [...]. XLA copies x only if it is used elsewhere."""
    return jax.new_ref(x, memory_space=plgpu.GMEM)


def _discharge_refs_inside_custom_vmap() -> None:
    """JAX 0.10 lacks this rule, so an `accumulator` under a custom_vmap could not be compiled."""
    from jax._src.custom_batching import custom_vmap_p
    from jax._src.state import discharge
    from jax.extend.core import jaxpr_as_fun

    def rule(in_avals, out_avals, *operands, call, **_):
        pure = discharge.discharge_state(call)
        return (None,) * len(in_avals), jaxpr_as_fun(pure)(*operands)

    discharge.register_discharge_rule(custom_vmap_p)(rule)


if jax.__version_info__ < (0, 11):
    _discharge_refs_inside_custom_vmap()


def unchecked_axes():
    """A context to trace in as if outside of `jax.shard_map`: kernels do not say over which axes their results vary."""
    from jax._src import config

    return config._check_vma(False)


def load(ref, layout, optimized: bool = True):
    """Reads a ref into registers of a layout; one in global memory has no `optimized` way."""
    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)  # pyright: ignore[reportCallIssue]

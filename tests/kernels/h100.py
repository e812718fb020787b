"""Compiles functions for an H100 on a machine without a GPU, and reads what ptxas says of their kernels.

Needs jax-cuda13-plugin, jax-cuda13-pjrt and the CUDA compiler's wheels; `make test-compile` installs them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import tempfile
from pathlib import Path

import jax

# What XLA needs to know of the device. Figures: NVIDIA H100 SXM.
_DEVICE = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  device_memory_size: 84942979072  l2_cache_size: 52428800
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# ptxas serialized the wgmmas: correct, and half as fast.
_SERIALIZED = re.compile(r"\((C7510|C7512|C7513|C7514)\)[^\n]*")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel."""

    name: str
    registers: int  # a thread, before warpgroups trade theirs
    spill_bytes: int  # stored
    serialized: str | None


def compile_for_h100(function, *shapes, donated: tuple[int, ...] = ()):
    """The compiled function, and a Kernel for each of ours in it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_TO=folder)
        try:
            compiled = _compile(jax.jit(function, donate_argnums=donated), *shapes)
        finally:
            del os.environ["MOSAIC_GPU_DUMP_PTXAS"], os.environ["MOSAIC_GPU_DUMP_TO"]
        return compiled, [_read(path) for path in sorted(Path(folder).glob("*.ptxas"))]


@functools.cache
def h100s(count: int) -> jax.sharding.Mesh:
    """A mesh of devices that are not there, along an axis x."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=_DEVICE, topology=f"1x1x{count}")
    return topologies.make_mesh(topology, (count,), ("x",))


def _compile(function, *shapes):
    mesh = h100s(1)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function.trace(*shapes).lower(lowering_platforms=("cuda",)).compile()


def _read(path: Path) -> Kernel:
    text = path.read_text()
    (registers,) = re.findall(r"Used (\d+) registers", text)
    (spilled,) = re.findall(r"stack frame, (\d+) bytes spill stores", text)
    serialized = _SERIALIZED.search(text)
    name = re.sub(r"_\d+$", "", path.stem)
    return Kernel(name, int(registers), int(spilled), serialized and serialized[0])

"""What lies behind the last sequence of a packed call, which may be NaN, and NaN times a weight of 0 is NaN.

Clearing whole arrays would cost as much as a third of a kernel. So a kernel reads an array as it is but for the block
where its sequences end: of that block it reads a copy, with zeros behind the end.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.parts import tma
from pallas_kernels.problem import AttentionArrays

_OF_QUERIES = ("q_gmem", "do_gmem")
_TAIL = "_tail"


def inputs(a: AttentionArrays, block_q: int, block_kv: int, **arrays: jax.Array) -> dict[str, jax.Array]:
    """What a kernel needs beside some of its inputs, which it copies in blocks of rows: the last block of each."""
    if a.row_ends is None:
        return {}
    blocks = jnp.array([block_q, block_kv], jnp.int32)
    starts = a.row_ends // blocks * blocks
    found = {"tail_rows_gmem": starts}
    for name, x in arrays.items():
        n = _side(name)
        found[name + _TAIL] = _block(x, starts[:, n], a.row_ends[:, n], (block_q, block_kv)[n])
    return found


def joined(gmem: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a kernel by name, those that have a tail together with it."""
    starts = gmem.pop("tail_rows_gmem", None)
    for name in [name for name in gmem if name.endswith(_TAIL)]:
        whole = name.removesuffix(_TAIL)
        gmem[whole] = tma.Ended(gmem[whole], gmem.pop(name), starts.at[:, _side(whole)])
    return gmem


def of_entry(refs, b):
    """refs of a kernel before it copies from a batch entry: a read of global memory at each copy would be a wait."""
    ended = {name: x for name, x in refs._asdict().items() if isinstance(x, tma.Ended)}
    starts = {name: x.start[tma.batch_entry(x.start, b)] for name, x in ended.items()}
    return refs._replace(**{name: x._replace(start=starts[name]) for name, x in ended.items()})


def _side(name: str) -> int:
    """0 for an array of query rows, 1 for one of keys."""
    return 0 if name in _OF_QUERIES else 1


def _block(x: jax.Array, start: jax.Array, end: jax.Array, block: int) -> jax.Array:
    """The rows from start [B|1] on of x [B, S, heads, dim], with zeros from end [B|1] on, as TMA takes them."""
    rows = start[:, None] + jnp.arange(block)
    rows = jnp.broadcast_to(jnp.where(rows < end[:, None], rows, x.shape[1]), (x.shape[0], block))
    take = jax.vmap(lambda x, rows: x.at[rows].get(mode="fill", fill_value=0))
    return tma.fit(take(x, rows), block)

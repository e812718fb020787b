"""Key ranges: the first and the last key that each query sees, and where it stands among the keys.

One form for all that makes queries of one call see different keys: packed sequences, caches, left padding.
"""

from __future__ import annotations

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jflash._arguments import are_starts, known
from pallas_kernels.parts import ranges
from pallas_kernels.problem import AttentionProblem


@functools.partial(jax.jit, static_argnums=0)
def packed(p: AttentionProblem, cu_seqlens_q: jax.Array, cu_seqlens_k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[1, 3, Sq] of packed sequences, and the sequence [Sq] of each query; each stands at the end of its keys."""
    cu_seqlens_q, cu_seqlens_k = jnp.asarray(cu_seqlens_q), jnp.asarray(cu_seqlens_k)  # numpy's under disable_jit
    row = jnp.arange(p.Sq, dtype=jnp.int32)
    sequence = sequence_of(row, cu_seqlens_q)
    _, q_end = _ends(cu_seqlens_q, sequence)
    k_start, k_end = _ends(cu_seqlens_k, sequence)
    k_end = jnp.where(row < cu_seqlens_q[-1], k_end, 0)  # behind the last sequence: no key, and no tile
    return ranges.limited(p, (row + k_end - q_end)[None], k_start[None], k_end[None]), sequence


def sequence_of(token: jax.Array, cu_seqlens: jax.Array) -> jax.Array:
    """The sequence of each packed token; of one behind the last sequence, the last."""
    # Unrolled, it is one kernel on a GPU; a loop there costs 0.2 ms.
    sequence = jnp.searchsorted(cu_seqlens, token, side="right", method="scan_unrolled") - 1
    return jnp.clip(sequence, 0, max(cu_seqlens.shape[0] - 2, 0)).astype(jnp.int32)


def _ends(cu_seqlens: jax.Array, sequence: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cu_seqlens[sequence], cu_seqlens.at[sequence + 1].get(mode="clip")


def check_cu_seqlens(name: str, x, tokens: int, longest=None) -> Any:
    """int32 [N + 1]: where each of N packed sequences starts, then where the last ends, at `tokens` or before.

    `longest`, if given, must be no less than any length. Values are checked where they are known; then the result
    is a numpy array.
    """
    x = known(name, x)
    if x.dtype.name not in ("int32", "int64"):
        raise TypeError(f"{name}.dtype={x.dtype.name} must be int32 or int64")
    if x.ndim != 1 or x.shape[0] == 0:
        raise ValueError(f"{name}.shape={x.shape} must be [N + 1] for N sequences")
    longest = _longest(name, longest)
    if not isinstance(x, Tracer):
        if not are_starts(x, tokens):
            raise ValueError(f"{name}={x.tolist()} must start at 0, never fall, and end at {tokens} or before")
        found = np.diff(x).max(initial=0)
        if longest is not None and found > longest:
            raise ValueError(f"max_seqlen={longest} must be >= {found}, the longest of {name}={x.tolist()}")
    return x.astype(jnp.int32)


def _longest(name: str, x) -> int | None:
    if x is None or isinstance(x, Tracer):
        return None
    if isinstance(x, (jax.Array, np.ndarray)) and x.ndim == 0:
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        raise TypeError(f"max_seqlen={x!r} of {name} must be an integer")
    return int(x)

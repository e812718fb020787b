"""The decays of a chunk of tokens, from sums of their logs, in wgmma's register layout.

The sums run over a chunk and no further, so their differences keep the digits that 16-bit operands have.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat
from pallas_kernels.parts import masking, softmax

CHUNK = 64  # tokens
_LEAST = -100.0  # log2 of a decay that leaves nothing: a sum of lesser ones would have no digits behind the point


def sums(log_decay: jax.Array, length: int, suffix: bool) -> jax.Array:
    """log2 of the decays summed within each chunk: from its first token up to each, or from its last if `suffix`.

    [B|1, S|1, H] -> float32 [B|1, H, length padded to whole chunks].
    """
    g = jnp.maximum(log_decay.astype(jnp.float32) * softmax.LOG2E, _LEAST)
    g = jnp.moveaxis(g, 1, 2)
    g = jnp.broadcast_to(g, (*g.shape[:2], length))
    g = jnp.pad(g, ((0, 0), (0, 0), (0, -length % CHUNK)))
    return lax.cumsum(g.reshape(*g.shape[:2], -1, CHUNK), axis=3, reverse=suffix).reshape(g.shape)


class Decays(NamedTuple):
    """Of one chunk, from the sums of its tokens as rows and as columns, and that of all.

    adjoint: a row is the later of two tokens where it was the earlier, and enters where it left.
    """

    rows: jax.Array
    columns: jax.Array
    all: jax.Array
    adjoint: bool

    def within(self) -> jax.Array:
        """From the token of a column to that of a row; garbage, maybe inf, where it lies on the other side."""
        apart = self._over_columns(self.rows) - lax.broadcast_in_dim(self.columns, (CHUNK, CHUNK), [1])
        return jnp.exp2(-apart if self.adjoint else apart)

    def enter(self) -> jax.Array:
        """From the edge where the walk enters the chunk to the token of a row."""
        return self._over_columns(jnp.exp2(self.all - self.rows if self.adjoint else self.rows))

    def leave(self) -> jax.Array:
        """From the token of a row to the edge where the walk leaves the chunk."""
        return self._over_columns(jnp.exp2(self.rows if self.adjoint else self.all - self.rows))

    def total(self) -> jax.Array:
        """Through the whole chunk."""
        return jnp.exp2(self.all)

    def _over_columns(self, x: jax.Array) -> jax.Array:
        return softmax.over_columns(x, (CHUNK, CHUNK))


def load(ref: Any, suffix: bool, adjoint: bool) -> Decays:
    """From a chunk of `sums` in shared memory."""
    rows, columns = (_compat.load(ref, layout) for layout in (softmax.ROWS, masking.COLUMNS))
    return Decays(rows, columns, ref[0 if suffix else CHUNK - 1], adjoint)

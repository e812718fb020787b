"""Attention over sequences that are split between devices: each keeps its queries, keys and values go round.

Batches and heads need nothing of this: calls of `jflash` inside `jax.jit` are split by themselves.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jflash import backends
from jflash._arguments import bind
from jflash._op import attend, gradients
from jflash._partition import varying, varying_over
from pallas_kernels.problem import AttentionArrays, AttentionProblem

_BACKENDS = tuple(b for b in backends.BACKENDS if b.name in ("hopper", "xla"))  # whose backward takes lse as it is


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """`flash_attention` inside `jax.shard_map`, of a sequence split over an axis of the mesh: `softmax(scale q k^T) v`.

    Device n of the axis has the n-th of equal chunks of the sequence. Keys and values visit one device after another
    while the next ones are on their way; a device never has more than two chunks of them, forward and backward.
    Causal calls leave out the chunks that nobody sees, so the last device works longest.

    Args:
        q: [B, Sq, H, D], the chunk of this device. k: [B, Sk, Hk, D]. v: [B, Sk, Hk, Dv]. As for `flash_attention`.
        axis_name: the axis of the mesh.
        causal: queries see the keys up to their own position in the whole sequence. Sq = Sk.
        scale, softcap, return_lse: as there.
        implementation: None, "hopper" or "xla".

    Returns:
        out [B, Sq, H, Dv] in q's dtype, or (out, lse) with lse [B, H, Sq], of this device's queries. Differentiable.

    Raises:
        ValueError, TypeError: as `flash_attention`, or causal with Sq != Sk.
        NameError: outside of a `jax.shard_map` over axis_name.

    Source: Liu et al., Ring Attention (arXiv 2310.01889).
    """
    whole, arrays = bind(q, k, v, scale=scale, softcap=softcap)
    own, _ = bind(q, k, v, scale=scale, softcap=softcap, causal=causal)
    if causal and whole.Sq != whole.Sk:
        raise ValueError(f"chunks of q and k, {whole.Sq} and {whole.Sk} long, must be equal with causal=True")
    chosen = backends.choose(own, implementation, _BACKENDS)
    if own.empty:
        out, lse = attend(own, "reference", arrays)
    else:
        ring = _Ring(axis_name, lax.axis_size(axis_name), causal, chosen, own, whole)
        out, lse = _attend(ring, *varying_over(varying(arrays) | {axis_name}, arrays[:3]))  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse) if return_lse else out


class _Ring(NamedTuple):
    axis: str
    size: int
    causal: bool
    backend: str
    own: AttentionProblem  # of the device's own chunk of keys
    other: AttentionProblem  # of a chunk of another, all of which is seen

    def passed_on(self, arrays):
        """Those of the device before."""
        return lax.ppermute(arrays, self.axis, [(n, (n + 1) % self.size) for n in range(self.size)])

    def visited(self, visit, kv, so_far):
        """Folds visit(so_far, kv, n) over the chunks of the others, n devices back; the next one is on its way."""
        if self.size == 1:
            return so_far

        def step(carry, n):
            kv, so_far = carry
            return (self.passed_on(kv), visit(so_far, kv, n)), None

        (kv, so_far), _ = lax.scan(step, (self.passed_on(kv), so_far), jnp.arange(1, self.size - 1))
        return visit(so_far, kv, self.size - 1)

    def if_seen(self, n, update, so_far):
        """update(so_far) where this device sees the chunk from n devices back."""
        return lax.cond(lax.axis_index(self.axis) >= n, update, lambda x: x, so_far) if self.causal else update(so_far)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    def visit(so_far, kv, n):
        return ring.if_seen(
            n, lambda x: _merged(*x, *attend(ring.other, ring.backend, AttentionArrays(q, *kv))), so_far
        )

    out, lse = attend(ring.own, ring.backend, AttentionArrays(q, k, v))
    out, lse = ring.visited(visit, (k, v), (out.astype(lse.dtype), lse))
    return out.astype(q.dtype), lse


def _attend_fwd(ring: _Ring, q, k, v):
    out, lse = _attend(ring, q, k, v)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse), (q, k, v, out, lse)


def _attend_bwd(ring: _Ring, residuals, cotangents):
    """With lse and out of the whole row, the gradients through each chunk of keys add up; dk and dv go round too."""
    q, k, v, *rows = residuals

    def through(problem, k, v):
        found = gradients(problem, ring.backend, (AttentionArrays(q, k, v), *rows, *cotangents))
        return tuple(x.astype(rows[1].dtype) for x in (found.q, found.k, found.v))

    def visit(so_far, kv, n):
        dq, *dkv = ring.if_seen(n, lambda x: tuple(map(jnp.add, x, through(ring.other, *kv))), so_far)
        return (dq, *ring.passed_on(dkv))

    dq, *dkv = through(ring.own, k, v)
    found = ring.visited(visit, (k, v), (dq, *(ring.passed_on(dkv) if ring.size > 1 else dkv)))
    return tuple(map(lambda gradient, x: gradient.astype(x.dtype), found, (q, k, v)))


_attend.defvjp(_attend_fwd, _attend_bwd)


def _merged(out, lse, other_out, other_lse):
    """out and lse over two sets of keys. Device n has seen its own, so lse is not -inf."""
    both = jnp.logaddexp(lse, other_lse)
    old, new = (jnp.moveaxis(jnp.exp(x - both), 1, 2)[..., None] for x in (lse, other_lse))
    return old * out + new * other_out, both

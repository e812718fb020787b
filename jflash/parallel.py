"""Attention over sequences that are split between devices: each keeps its queries, keys and values go round.

Batches and heads need nothing of this: calls of `jflash` inside `jax.jit` are split by themselves.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    zigzag: bool = False,
    softcap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """`flash_attention` inside `jax.shard_map`, of a sequence split over an axis of the mesh: `softmax(scale q k^T) v`.

    Device n of the axis has the n-th of equal chunks of the sequence. Keys and values visit one device after another
    while the next ones are on their way; a device never has more than two chunks of them, forward and backward.
    A causal call leaves out the chunks that a device does not see, so the last device works longest, twice as long as
    all do with `zigzag`.

    Args:
        q: [B, Sq, H, D], the chunk of this device. k: [B, Sk, Hk, D]. v: [B, Sk, Hk, Dv]. As for `flash_attention`.
        axis_name: the axis of the mesh.
        causal: queries see the keys up to their own position in the whole sequence. Sq = Sk.
        zigzag: the sequence lies in the order of `zigzag_order`. Causal calls only; Sq is even.
        scale, softcap, return_lse: as there.
        implementation: None, "hopper" or "xla".

    Returns:
        out [B, Sq, H, Dv] in q's dtype, or (out, lse) with lse [B, H, Sq], of this device's queries. Differentiable.

    Raises:
        ValueError, TypeError: as `flash_attention`; causal with Sq != Sk; zigzag without causal or with odd Sq.
        NameError: outside of a `jax.shard_map` over axis_name.

    Source: Liu et al., Ring Attention (arXiv 2310.01889).
    """
    whole, arrays = bind(q, k, v, scale=scale, softcap=softcap)
    own, _ = bind(q, k, v, scale=scale, softcap=softcap, causal=causal)
    if causal and whole.Sq != whole.Sk:
        raise ValueError(f"chunks of q and k, {whole.Sq} and {whole.Sk} long, must be equal with causal=True")
    if zigzag and (not causal or whole.Sq % 2):
        raise ValueError(f"zigzag with causal={causal} and chunks {whole.Sq} long needs causal=True and an even length")
    chosen = backends.choose(own, implementation, _BACKENDS)
    if own.empty:
        out, lse = attend(own, "reference", arrays)
    else:
        ring = _Ring(axis_name, lax.axis_size(axis_name), chosen, own, *_views(whole, causal, zigzag))
        out, lse = _attend(ring, *varying_over(varying(arrays) | {axis_name}, arrays[:3]))  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse) if return_lse else out


def zigzag_order(length: int, devices: int) -> np.ndarray:
    """Which positions of a sequence lie where for `ring_attention(zigzag=True)`: int [length].

    `x[:, zigzag_order(S, n)]`, split in n, gives device i the i-th and the i-th last of 2 n equal chunks; the
    argsort of the order undoes it. What depends on positions, such as rotary embeddings, comes before.

    Raises:
        ValueError: length is not a multiple of 2 n.
    """
    if length % (2 * devices):
        raise ValueError(f"length={length} must be a multiple of 2 devices={2 * devices}")
    chunks = np.arange(length).reshape(2 * devices, -1)
    return np.stack([chunks[:devices], chunks[::-1][:devices]], axis=1).ravel()


class _View(NamedTuple):
    """What a device sees of a visiting chunk: the queries from a row on see the keys up to an end, all of them."""

    problem: AttentionProblem
    row: int
    end: int


class _Ring(NamedTuple):
    axis: str
    size: int
    backend: str
    own: AttentionProblem  # of the device's own chunk of keys
    lower: _View | None  # of the chunk of a device before this one
    higher: _View | None

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

    def seen(self, n, update, so_far):
        """update(view, so_far) with what this device sees of the chunk from n devices back."""
        lower, higher = (
            (lambda x: x) if view is None else functools.partial(update, view) for view in (self.lower, self.higher)
        )
        if self.lower == self.higher:
            return lower(so_far)
        return lax.cond(lax.axis_index(self.axis) >= n, lower, higher, so_far)


def _views(whole: AttentionProblem, causal: bool, zigzag: bool) -> tuple[_View | None, _View | None]:
    """Of the chunk of a lower and of a higher device. In zigzag half of a chunk lies at the end of the sequence."""
    half = whole.Sq // 2
    every = _View(whole, 0, whole.Sk)
    if not zigzag:
        return every, None if causal else every
    return _View(dataclasses.replace(whole, Sk=half), 0, half), _View(
        dataclasses.replace(whole, Sq=half), half, whole.Sk
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    def update(kv, view, so_far):
        mine = AttentionArrays(q[:, view.row :], *(x[:, : view.end] for x in kv))
        out, lse = attend(view.problem, ring.backend, mine)
        return _merged(so_far, (_padded(out, 1, view.row, 0), _padded(lse, 2, view.row, 0, -jnp.inf)))

    def visit(so_far, kv, n):
        return ring.seen(n, functools.partial(update, kv), so_far)

    out, lse = attend(ring.own, ring.backend, AttentionArrays(q, k, v))
    out, lse = ring.visited(visit, (k, v), (out.astype(lse.dtype), lse))
    return out.astype(q.dtype), lse


def _attend_fwd(ring: _Ring, q, k, v):
    out, lse = _attend(ring, q, k, v)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse), (q, k, v, out, lse)


def _attend_bwd(ring: _Ring, residuals, cotangents):
    """With lse and out of the whole row, the gradients through each chunk of keys add up; dk and dv go round too."""
    q, k, v, out, lse = residuals
    d_out, d_lse = cotangents

    def through(problem, k, v, row=0):
        rows = out[:, row:], lse[:, :, row:], d_out[:, row:], d_lse[:, :, row:]
        found = gradients(problem, ring.backend, (AttentionArrays(q[:, row:], k, v), *rows))
        return [x.astype(lse.dtype) for x in (found.q, found.k, found.v)]

    def update(kv, view, so_far):
        dq, *dkv = through(view.problem, *(x[:, : view.end] for x in kv), row=view.row)
        below = k.shape[1] - view.end
        found = _padded(dq, 1, view.row, 0), *(_padded(x, 1, 0, below) for x in dkv)
        return tuple(map(jnp.add, so_far, found))

    def visit(so_far, kv, n):
        dq, *dkv = ring.seen(n, functools.partial(update, kv), so_far)
        return (dq, *ring.passed_on(dkv))

    dq, *dkv = through(ring.own, k, v)
    found = ring.visited(visit, (k, v), (dq, *(ring.passed_on(dkv) if ring.size > 1 else dkv)))
    return tuple(map(lambda gradient, x: gradient.astype(x.dtype), found, (q, k, v)))


_attend.defvjp(_attend_fwd, _attend_bwd)


def _merged(so_far, other):
    """out and lse over two sets of keys. Every query has seen the keys of its device, so the first lse is not -inf."""
    (out, lse), (other_out, other_lse) = so_far, other
    both = jnp.logaddexp(lse, other_lse)
    old, new = (jnp.moveaxis(jnp.exp(x - both), 1, 2)[..., None] for x in (lse, other_lse))
    return old * out + new * other_out, both


def _padded(x, axis: int, before: int, after: int, value: float = 0):
    return lax.pad(
        x, jnp.asarray(value, x.dtype), [(before, after, 0) if n == axis else (0, 0, 0) for n in range(x.ndim)]
    )

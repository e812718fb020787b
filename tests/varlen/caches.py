"""One call on a random cache, held to the oracle entry by entry. Whatever no query sees is NaN."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jflash import flash_attention, flash_attention_with_kvcache
from tests.oracle import assert_close, on_the_cpu


def assert_decodes(
    lengths, *, H, D, Hk=None, Sq=1, room=0, page=None, leftpad=None, sinks=False, dtype=jnp.bfloat16, **options
):
    """out and lse of Sq queries of each entry, whose cache has `room` beyond the longest; by the hopper backend.

    page: the cache is cut into pages of that size, which lie in random order among pages of NaN.
    """
    rng = np.random.default_rng(0)
    B, Hk, Sc, lengths = len(lengths), Hk or H, max(lengths) + room, np.asarray(lengths, np.int32)
    q, k, v = (rng.normal(size=(B, n, h, D)) for n, h in ((Sq, H), (Sc, Hk), (Sc, Hk)))
    first = np.zeros_like(lengths) if leftpad is None else np.asarray(leftpad, np.int32)
    if sinks:
        options["sinks"] = jnp.asarray(rng.normal(size=H), jnp.float32)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    slot = np.arange(Sc)
    unseen = ((slot < first[:, None]) | (slot >= lengths[:, None]))[:, :, None, None]
    layout = {} if leftpad is None else {"cache_leftpad": first}
    caches = [jnp.where(unseen, jnp.nan, x) for x in (k, v)]
    if page is not None:
        n = -(-Sc // page)
        order = rng.permutation(B * n + 3)[: B * n].astype(np.int32)
        caches = [_cut(x, page, order) for x in caches]
        layout["block_table"] = order.reshape(B, n)
    call = functools.partial(flash_attention_with_kvcache, return_lse=True, implementation="hopper")
    out, _, _, lse = call(q, *caches, cache_seqlens=lengths, **layout, **options)
    low, ref = (_by_entry(q, k, v, first, lengths, wide, options) for wide in (False, True))
    assert_close("out", out, low[0], ref[0], dtype)
    assert_close("lse", lse, low[1], ref[1], dtype)


def _cut(x, page: int, order):
    B, Sc, *rest = x.shape
    n = -(-Sc // page)
    x = jnp.pad(x, ((0, 0), (0, n * page - Sc), (0, 0), (0, 0)), constant_values=jnp.nan)
    return jnp.full((B * n + 3, page, *rest), jnp.nan, x.dtype).at[order].set(x.reshape(-1, page, *rest))


def _by_entry(q, k, v, first, lengths, wide: bool, options: dict):
    """out and lse by the oracle, in the inputs' dtype or in float64, on the keys that each entry has."""
    attend = functools.partial(flash_attention, return_lse=True, implementation="reference")
    found = []
    with on_the_cpu(), jax.enable_x64(wide):
        q, k, v = (jnp.asarray(np.asarray(x, np.float64 if wide else x.dtype)) for x in (q, k, v))
        if "sinks" in options:
            options = {**options, "sinks": jnp.asarray(np.asarray(options["sinks"], q.dtype if wide else np.float32))}
        slopes, options = options.get("alibi_slopes"), {n: x for n, x in options.items() if n != "alibi_slopes"}
        for b, keys in enumerate(map(slice, first, lengths)):
            own = {} if slopes is None else {"alibi_slopes": slopes if slopes.ndim == 1 else slopes[b]}
            found.append(attend(q[b : b + 1], k[b : b + 1, keys], v[b : b + 1, keys], **options, **own))
    return tuple(np.concatenate([np.asarray(y, np.float64) for y in x]) for x in zip(*found, strict=True))

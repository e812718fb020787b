"""Four CPU devices: run by test_sharded.py in a process of its own, whose XLA_FLAGS make them.

A call on shards gives what it gives alone, and the compiled program moves nothing between devices but the sums of
what is shared: so each device worked on its own part.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jflash
from jflash import LinearAttentionState, backends, flash_attention, l1_attention, linear_attention

B, S, H, Hk, D = 4, 24, 8, 4, 8
COLLECTIVES = re.compile(r"\b(all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(")
SEEN: list[tuple[int, int]] = []  # the batch and the heads of the calls that backends were given
ROWS = "BSHD"  # of q, k, v and out


class Case(NamedTuple):
    """A function of arrays, these arrays, and for each the letters of its axes: B and H are split where not 1."""

    function: Callable
    arrays: tuple
    axes: tuple[str, ...]
    result_axes: tuple[str, ...] = (ROWS,)
    sums: bool = False  # gradients of what the shards share
    batch: bool = True  # may be split
    differentiable: bool = True
    whole_heads: bool = False  # not split by four, as a group would be


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv(H=H, Hk=Hk, B=B):
    return random(0, B, S, H, D), random(1, B, S, Hk, D), random(2, B, S, Hk, D)


def everything(q, k, v, bias, sinks, mask, ids, slopes):
    return flash_attention(
        q, k, v, causal=True, bias=bias, sinks=sinks, mask=mask, segment_ids=ids,
        alibi_slopes=slopes, return_lse=True,
    )  # fmt: skip


def dropped(q, k, v):
    return flash_attention(q, k, v, dropout_rate=0.4, dropout_key=jax.random.key(3))


def with_state(q, k, v, log_decay, kv):
    out, state = linear_attention(
        q, k, v, log_decay=log_decay, initial_state=LinearAttentionState(kv, None), return_state=True
    )
    return out, state.kv


def packed(q, k, v):
    cu = jnp.array([0, 7, 7, 20], jnp.int32)
    return jflash.flash_attention_varlen(q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)[None]


def decoded(q, k_cache, v_cache, k, v, lengths):
    return jflash.flash_attention_with_kvcache(q[:, :1], k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)


_MASK, _IDS = random(5, B, 1, 1, S) > -1, np.arange(B * S, dtype=np.int32).reshape(B, S) // 10
CASES = {
    "causal": Case(lambda *x: flash_attention(*x, causal=True), qkv(), (ROWS,) * 3),
    "everything": Case(
        everything,
        (*qkv(), random(3, 1, H, 1, S), random(4, H), _MASK, _IDS, np.linspace(0.1, 1, H, dtype=np.float16)),
        (ROWS, ROWS, ROWS, ".H..", "H", "B...", "B.", "H"), (ROWS, "BHS"), sums=True,
    ),
    "dropout": Case(dropped, qkv(), (ROWS,) * 3),
    "one key head": Case(lambda *x: flash_attention(*x, window=(5, 2)), qkv(Hk=1), (ROWS,) * 3, sums=True),
    "groups": Case(lambda *x: flash_attention(*x, causal=True), qkv(Hk=2), (ROWS,) * 3, whole_heads=True),
    "l1": Case(lambda *x: l1_attention(*x, causal=True), qkv(), (ROWS,) * 3),
    "packed": Case(packed, qkv(B=1), (ROWS,) * 3, batch=False),
    "cache": Case(
        decoded, (*qkv(), random(3, B, 2, Hk, D), random(4, B, 2, Hk, D), np.array([3, S - 2, 0, 17], np.int32)),
        (*(ROWS,) * 5, "B"), (ROWS,) * 3, differentiable=False,
    ),
    "vmap": Case(jax.vmap(lambda *x: flash_attention(*x, causal=True)),
                 tuple(x[:, None] for x in qkv()), ("B.SHD",) * 3, ("B.SHD",)),
    "linear": Case(
        with_state, (*qkv(), -abs(random(3, B, S, H)), random(4, B, H, D, D)), (ROWS, ROWS, ROWS, "BSH", "BH.."),
        (ROWS, "BH.."),
    ),
    "linear decay of heads": Case(
        lambda q, k, v, g: linear_attention(q, k, v, log_decay=g), (*qkv(Hk=1), -abs(random(3, H))),
        (ROWS, ROWS, ROWS, "H"), sums=True,
    ),
    "linear mask": Case(
        lambda q, k, v, m: linear_attention(q, k, v, mask=m), (*qkv(), random(3, 1, 1, S, S)),
        (ROWS, ROWS, ROWS, "...."), sums=True,
    ),
    "linear packed": Case(
        lambda *x: linear_attention(*x, cu_seqlens=jnp.array([0, 7, 20], jnp.int32)), qkv(B=1), (ROWS,) * 3, batch=False
    ),
}  # fmt: skip


def gradients(case: Case):
    """The results and the gradients of the float32 arrays, as a function of arrays and cotangents."""
    floating = [n for n, x in enumerate(case.arrays) if x.dtype == np.float32 and case.differentiable]

    def function(arrays, *some):
        every = dict(enumerate(arrays)) | dict(zip(floating, some, strict=True))
        found = case.function(*every.values())
        return found if isinstance(found, tuple) else (found,)

    def run(arrays, cotangents):
        results, pull = jax.vjp(lambda *some: function(arrays, *some), *(arrays[n] for n in floating))
        return *results, *pull(cotangents)

    return run, [case.axes[n] for n in floating]


def watched(backend: backends.Backend) -> backends.Backend:
    """The backend, noting what it is given to do."""

    def noting(run):
        def noted(problem, *operands):
            SEEN.append((problem.B, problem.H))
            return run(problem, *operands)

        return run and noted

    return dataclasses.replace(backend, forward=noting(backend.forward), backward=noting(backend.backward))


def check(case: Case, mesh: Mesh, names: dict, inside: bool) -> set[str]:
    """Compares a call on shards with the call alone; returns what moves between devices. `inside`: of shard_map."""

    def spec(letters: str, x) -> P:
        return P(*(names.get(a) if n % parts.get(a, 1) == 0 else None for a, n in zip(letters, x.shape, strict=True)))

    parts = {axis: math.prod(mesh.shape[name] for name in names.get(axis, ())) for axis in "BH"}
    run, axes_of_gradients = gradients(case)
    results = jax.eval_shape(case.function, *case.arrays)
    results = results if isinstance(results, tuple) else (results,)
    cotangents = tuple(random(10 + n, *x.shape) for n, x in enumerate(results))
    alone = jax.jit(run)(case.arrays, cotangents)
    specs = tuple(map(spec, case.axes, case.arrays)), tuple(map(spec, case.result_axes, cotangents))
    wanted = tuple(map(spec, (*case.result_axes, *axes_of_gradients), alone))
    if inside:
        run = jax.shard_map(run, in_specs=specs, out_specs=wanted)
    operands = jax.device_put((case.arrays, cotangents), specs)
    SEEN.clear()
    compiled = jax.jit(run).lower(*operands).compile()
    calls = 2 if case.differentiable else 1
    heads = H if case.whole_heads and parts["H"] > 2 else H // parts["H"]
    assert SEEN.count((case.arrays[0].shape[0] // parts["B"], heads)) >= calls, SEEN
    for n, (one, many) in enumerate(zip(alone, compiled(*operands), strict=True)):
        assert np.abs(one).max() > 0.01, n
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4, err_msg=f"result {n}")
        assert many.sharding.is_equivalent_to(NamedSharding(mesh, wanted[n]), many.ndim), (n, many.sharding)
    return set(COLLECTIVES.findall(compiled.as_text() or ""))


def main(*chosen: str):
    """Runs "case/axes/way": the axes B, H or BH are split, the way is auto, explicit or shard_map."""
    for family in ("BACKENDS", "LINEAR", "L1", "CACHE"):
        setattr(backends, family, tuple(map(watched, getattr(backends, family))))
    for each in chosen:
        name, axes, way = each.split("/")
        case = CASES[name]
        names = {"B": {"B": ("x", "y")}, "H": {"H": ("x", "y")}, "BH": {"B": ("x",), "H": ("y",)}}[axes]
        mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Explicit if way == "explicit" else AxisType.Auto,) * 2)
        with jax.set_mesh(mesh):
            moved = check(case, mesh, names if case.batch else {"H": names.get("H", ())}, way == "shard_map")
        gathered = {"all-gather"} if case.whole_heads and axes == "H" else set()
        assert moved <= ({"all-reduce"} if case.sums else gathered), (each, moved)
        print(f"{each}: equal")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`python -m bench linear`: linear attention, masked, with decay, and one token at a time."""

from __future__ import annotations

# pyright: reportMissingImports=false
import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from bench import results, run
from bench.peers import Peer, Shape, available, jax_peer, ready, torch_peer
from bench.timing import Timed, interleaved
from jflash import LinearAttentionState, flash_attention, linear_attention, linear_attention_step


@dataclasses.dataclass(frozen=True)
class Case(Shape):
    """decay: "head" or "token"; mask: its batch and head sizes, over all pairs. Sq = 1 is a decode step."""

    decay: str | None = None
    mask: tuple[int, int] | None = None

    @property
    def family(self) -> str:
        return "linear" if self.mask is None else "masked_linear"

    def flops(self, direction: str) -> float | None:
        """Of a masked call: two products forward, five backward. Without a mask bytes count."""
        if self.mask is None:
            return None
        one = 2.0 * self.B * self.H * self.Sq * self.Sk * self.D
        return {"forward": 2, "backward": 5, "both": 7}[direction] * one

    def bytes(self, direction: str, dtype: str) -> float | None:
        """What must cross memory without a mask: q, k, v and out; backward their cotangents and dout too."""
        if self.mask is not None:
            return None
        if self.Sq == 1:
            return 2.0 * self.B * self.H * self.D * self.Dv * 4
        qk = self.B * self.Sq * (self.H + self.Hk) * self.D
        values = self.B * self.Sq * (self.Hk + self.H) * self.Dv
        forward, backward = qk + values, 2 * qk + self.B * self.Sq * (2 * self.Hk + self.H) * self.Dv
        elements = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
        return elements * jnp.dtype(dtype).itemsize


def square(B: int, S: int, H: int, D: int, **options) -> Case:
    return Case(B, S, S, H, H, D, D, **options)


def goals() -> Iterator[Case]:
    """The shapes that the goals are set on."""
    for decay in ("head", "token"):
        yield square(8, 4096, 32, 128, decay=decay)
        yield square(2, 16384, 16, 128, decay=decay)
        yield square(4, 16384, 8, 256, decay=decay)
        yield square(8, 4096, 32, 64, decay=decay)


def masked() -> Iterator[Case]:
    for mask in ((1, 1), (1, 12), (16, 12)):
        yield square(16, 1024, 12, 64, mask=mask)
    for mask in ((1, 1), (1, 16)):
        yield square(4, 8192, 16, 128, mask=mask)


def decode() -> Iterator[Case]:
    for B in (8, 64):
        yield square(B, 1, 32, 128, decay="head")


def seeds() -> Iterator[Case]:
    """The shapes of the seed's README and of its tests, with the masks it knows."""
    for H, D in ((8, 32), (12, 64)):
        for mask in ((1, 1), (16, 1)):
            yield square(16, 1024, H, D, mask=mask)


def lengths() -> Iterator[Case]:
    """As long as a mask of all pairs and its gradient fit the memory."""
    for S in 2 ** jnp.arange(9, 15 if run.on_gpu() else 13):
        yield square(1, int(S), 4, 64, decay="head")


def cpu() -> Iterator[Case]:
    for decay in (None, "head", "token"):
        yield square(1, 8192, 1, 64, decay=decay)
    yield square(1, 4096, 4, 64, decay="head")
    yield square(2, 1024, 4, 64, mask=(1, 1))


PRESETS = {"goals": goals, "masked": masked, "decode": decode, "seeds": seeds, "lengths": lengths, "cpu": cpu}


def inputs(case: Case, dtype: str) -> tuple[jax.Array, ...]:
    """q, k, v, then what there is of log decay, mask and state, then the cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 6)
    tokens = () if case.Sq == 1 else (case.Sq,)
    shapes = ((case.H, case.D), (case.Hk, case.D), (case.Hk, case.Dv), (case.H, case.Dv))
    q, k, v, cotangent = (
        jax.random.normal(key, (case.B, *tokens, *shape), jnp.dtype(dtype))
        for key, shape in zip(keys[:4], shapes, strict=True)
    )
    rest = []
    if case.decay is not None:
        shape = (case.H,) if case.decay == "head" else (case.B, case.Sq, case.H)
        rest.append(-0.1 * jax.random.uniform(keys[4], shape, jnp.float32))
    if case.mask is not None:
        rest.append(jax.random.normal(keys[5], (*case.mask, case.Sq, case.Sk), jnp.dtype(dtype)))
    if case.Sq == 1:
        rest.append(jnp.ones((case.B, case.H, case.D, case.Dv), jnp.float32))
    return q, k, v, *rest, cotangent


def _jflash(case: Case) -> Callable:
    if case.Sq == 1:
        return _step
    if case.mask is not None:
        return lambda q, k, v, mask: linear_attention(q, k, v, mask=mask, scale=1.0)
    return lambda q, k, v, *g: linear_attention(q, k, v, log_decay=g[0] if g else None)


def _step(q, k, v, g, kv):
    out, state = linear_attention_step(q, k, v, LinearAttentionState(kv), log_decay=g)
    return out, state.kv


def _as_mask(case: Case) -> Callable:
    """The same decay, as a mask that the caller stores."""

    def attend(q, k, v, g):
        return linear_attention(q, k, v, mask=_decays(case.Sq, g)[None])

    return attend


def _softmax(case: Case) -> Callable:
    """Causal softmax attention of the same shape, which is another function."""
    return lambda q, k, v, g: flash_attention(q, k, v, causal=True)


def _quadratic(case: Case) -> Callable:
    """The formula in jnp, with the weights in memory."""
    if case.Sq == 1 or case.decay == "token":
        raise NotImplementedError("the formula is for masks and decays by head")
    _check_room(case)

    def attend(q, k, v, *rest):
        if case.mask is None:
            M = _decays(case.Sq, rest[0] if rest else jnp.zeros(case.H)) * case.D**-0.5
        else:
            (M,) = rest
        weights = jnp.einsum("bihd,bjhd->bhij", q, k) * M.astype(q.dtype)
        return jnp.einsum("bhij,bjhd->bihd", weights, v)

    return attend


def _decays(S: int, g: jax.Array) -> jax.Array:
    """[H] -> [H, S, S]."""
    i, j = jnp.arange(S)[:, None], jnp.arange(S)
    return jnp.where(i >= j, jnp.exp((i - j) * g[:, None, None]), 0)


def _torch_formula(case: Case) -> Callable:
    """The seed's formula in torch, with the weights in memory."""
    if case.mask is None:
        raise NotImplementedError("the formula has a mask")
    _check_room(case)

    def attend(q, k, v, mask):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (((q @ k.mT) * mask) @ v).transpose(1, 2)

    return attend


def _fla(case: Case) -> Callable:
    from fla.ops.simple_gla import chunk_simple_gla

    _without_mask(case)
    name = {"head": "g_gamma", "token": "g"}
    return lambda q, k, v, *g: chunk_simple_gla(q, k, v, **({name[case.decay or ""]: g[0]} if g else {}))[0]


def _jla(case: Case) -> Callable:
    from jla.ops import linear_attention as jla

    _without_mask(case)

    def attend(q, k, v, *g):
        each = jnp.broadcast_to(g[0] if g else jnp.zeros(()), (case.B, case.Sq, case.H))
        return jla("simple_gla", q, k, v, g=each, scale=case.D**-0.5)[0]

    return attend


def _check_room(case: Case) -> None:
    """The weights of all heads fit the memory, a few times over."""
    weights, most = case.B * case.H * case.Sq * case.Sk, 5e9 if run.on_gpu() else 3e8
    if weights > most:
        raise NotImplementedError(f"{weights:.1g} weights in memory must be <= {most:.1g}")


def _without_mask(case: Case) -> None:
    if case.mask is not None or case.Sq == 1:
        raise NotImplementedError("for whole sequences without a mask")


_jax = functools.partial(jax_peer, inputs=inputs)
_torch = functools.partial(torch_peer, inputs=inputs)
BOTH = ("cpu", "cuda")
PEERS = (
    Peer("jflash", (), BOTH, _jax(_jflash)),
    Peer("fla", ("fla",), ("cuda",), _torch(_fla)),
    Peer("jla", ("jla",), BOTH, _jax(_jla)),
    Peer("jnp formula", (), BOTH, _jax(_quadratic)),
    Peer("torch formula", ("torch",), BOTH, _torch(_torch_formula)),
)

OTHER_FORMS = (
    Peer("jflash:masked", (), BOTH, _jax(_as_mask)),
    Peer("jflash:softmax", (), BOTH, _jax(_softmax)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run.add_arguments(parser, PRESETS, "goals, masked and decode")


def main(args: argparse.Namespace) -> results.Report:
    peers, dtype, report = available(PEERS, args.impls), run.dtype(args), run.new_report()
    for preset in run.presets(args, "goals", "masked", "decode"):
        forms = OTHER_FORMS if preset == "lengths" else ()
        for case in PRESETS[preset]():
            for direction in ("forward",) if case.Sq == 1 else args.directions or ("forward", "both"):
                report.add(_measure([*peers, *forms], case, dtype, direction, args), args.out)
    results.show(report)
    return report


def _measure(peers: list[Peer], case: Case, dtype: str, direction: str, args) -> list[results.Row]:
    shape = dataclasses.asdict(case)
    flops, size = case.flops(direction), case.bytes(direction, dtype)
    rows = []
    timed = interleaved(ready(peers, case, dtype, direction), args.rounds, args.seconds)
    for name, spread in timed.items():
        numbers = dataclasses.asdict(spread)
        gbps = None if size is None else size / spread.ms / 1e6
        tflops = None if flops is None or not run.on_gpu() else flops / spread.ms / 1e9
        rows.append(results.Row(case.family, direction, name, dtype, shape, **numbers, tflops=tflops, gbps=gbps))
    floor = "" if size is None else f"  floor {1e3 * size / memory_rate():.2f}ms"
    line = "  ".join(f"{row.impl} {row.ms:.2f}ms" for row in rows)
    print(f"{results.label(shape)} {direction}: {line}{floor}", flush=True)
    return rows


@functools.cache
def memory_rate() -> float:
    """Bytes a second of this run, reading and writing one large array: what the floors are printed by."""
    x = jnp.ones(2**28 if run.on_gpu() else 2**25, jnp.float32)
    negate = jax.jit(jnp.negative)
    spread = interleaved({"copy": Timed(lambda: negate(x), jax.block_until_ready)})
    return 2e3 * x.nbytes / spread["copy"].ms

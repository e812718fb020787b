"""Packed inputs, attention of them sequence by sequence, and the rule of `tests.oracle` for any function."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jflash import flash_attention
from tests.oracle import assert_close, on_the_cpu
from tests.parity.cases import outputs_and_gradients


def cu_seqlens(*lengths: int) -> jax.Array:
    return jnp.asarray([0, *itertools.accumulate(lengths)], jnp.int32)


def packed(seed, dtype=jnp.float32, *, Tq, Tk=None, H=4, Hk=2, D=16, Dv=None) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    Tk, Dv = Tq if Tk is None else Tk, Dv or D
    shapes = {"q": (Tq, H, D), "k": (Tk, Hk, D), "v": (Tk, Hk, Dv)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def by_sequence(q, k, v, *, cu_q, cu_k, alibi_slopes=None, bias=None, mask=None, segment_ids=None, **options):
    """out and lse of packed sequences by the oracle, one after another."""
    outs, lses = [], []
    for n in range(len(cu_q) - 1):
        i, j = (slice(int(cu[n]), int(cu[n + 1])) for cu in (cu_q, cu_k))
        square = {name: x[..., i, j] for name, x in (("bias", bias), ("mask", mask)) if x is not None}
        if segment_ids is not None:
            square["segment_ids"] = segment_ids[0][None, i], segment_ids[1][None, j]
        if alibi_slopes is not None:
            square["alibi_slopes"] = alibi_slopes if alibi_slopes.ndim == 1 else alibi_slopes[n]
        out, lse = flash_attention(
            q[None, i], k[None, j], v[None, j], **square, **options, return_lse=True, implementation="reference"
        )
        outs.append(out[0])
        lses.append(lse[0])
    behind = q.shape[0] - int(cu_q[-1])
    outs.append(jnp.zeros((behind, q.shape[1], v.shape[2]), q.dtype))
    lses.append(jnp.full((q.shape[1], behind), -jnp.inf, lses[0].dtype))
    return jnp.concatenate(outs), jnp.concatenate(lses, axis=1)


def assert_follows(ours, oracle, arrays: dict) -> None:
    """Outputs and all gradients of ours(arrays) within the rule of oracle(arrays), for random cotangents."""
    dtype = arrays["q"].dtype
    found = _flat(outputs_and_gradients(ours)(arrays))
    with on_the_cpu():
        low = _flat(outputs_and_gradients(oracle)({name: jnp.asarray(np.asarray(x)) for name, x in arrays.items()}))
    with jax.enable_x64(True), on_the_cpu():
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        ref = _flat(outputs_and_gradients(oracle)(wide))
    assert found.keys() == ref.keys()
    for name in ref:
        assert found[name].dtype == low[name].dtype, name
        assert_close(name, found[name], low[name], ref[name], dtype)


def _flat(results) -> dict:
    *outputs, gradients = jax.tree.leaves(results[:-1]), results[-1]
    return {**{f"output {n}": x for n, x in enumerate(outputs[0])}, **{f"d{k}": x for k, x in gradients.items()}}

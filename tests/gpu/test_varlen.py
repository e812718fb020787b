"""Packed sequences on the device: lengths known at run time only, many of them, and NaN behind the last."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention_varlen
from tests.varlen.rule import assert_follows, by_sequence, cu_seqlens, packed

LENGTHS = {
    "a_few": ((700, 1, 311), (700, 1, 311)),
    "zeros_and_more_keys": ((0, 300, 0, 0, 213, 1), (12, 500, 0, 20, 300, 181)),
    "many": (tuple(range(0, 96, 3)), tuple(range(0, 96, 3))),
    "whole_tiles": ((256, 128, 640), (256, 128, 640)),
}
CASES = {
    "D128": ("a_few", dict(D=128, H=4, Hk=2), dict(causal=True)),
    "D64": ("a_few", dict(D=64, H=4, Hk=2), dict(causal=True)),
    "D256": ("a_few", dict(D=256, H=2, Hk=1), dict(causal=True)),
    "D192": ("a_few", dict(D=192, Dv=128, H=2, Hk=2), {}),
    "full": ("whole_tiles", dict(D=128, H=2, Hk=2), {}),
    "zeros": ("zeros_and_more_keys", dict(D=128, H=4, Hk=1), dict(causal=True)),
    "zeros_full": ("zeros_and_more_keys", dict(D=64, H=2, Hk=2), {}),
    "many": ("many", dict(D=128, H=16, Hk=4), dict(causal=True)),
    "window": ("a_few", dict(D=128, H=2, Hk=2), dict(causal=True, window=(65, None))),
    "softcap": ("a_few", dict(D=64, H=2, Hk=2), dict(softcap=5.0)),
    "alibi": ("a_few", dict(D=128, H=2, Hk=1), dict(causal=True, alibi_slopes=jnp.array([0.3, 0.02]))),
    "alibi_of_each_D64": (
        "a_few",
        dict(D=64, H=2, Hk=2),
        dict(softcap=5.0, alibi_slopes=jnp.array([[0.3, 0.02], [1.0, 0.5], [0.1, 0.2]])),
    ),
    "alibi_many": ("many", dict(D=128, H=2, Hk=2), dict(alibi_slopes=jnp.array([0.3, 0.02]), deterministic=True)),
    "alibi_D256": ("a_few", dict(D=256, H=2, Hk=1), dict(causal=True, alibi_slopes=jnp.array([0.3, 0.02]))),
    "deterministic_D256": ("a_few", dict(D=256, H=2, Hk=1), dict(causal=True, deterministic=True)),
    "deterministic": ("a_few", dict(D=128, H=2, Hk=1), dict(causal=True, deterministic=True)),
}
BEHIND = (0, 3, 150)  # tokens, in turn


@pytest.mark.parametrize(("n", "name"), enumerate(CASES))
def test_matches_oracle(n, name):
    """One program for any lengths: they are arguments of a jitted function."""
    lengths, shape, options = CASES[name]
    cu_q, cu_k = (cu_seqlens(*x) for x in LENGTHS[lengths])
    behind = BEHIND[n % len(BEHIND)]
    arrays = packed(n, jnp.bfloat16, Tq=int(cu_q[-1]) + behind, Tk=int(cu_k[-1]) + behind, **shape)

    @jax.jit
    def call(arrays, cu_q, cu_k):
        return flash_attention_varlen(
            **arrays, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options, return_lse=True, implementation="hopper"
        )

    def oracle(arrays):
        return by_sequence(**arrays, cu_q=np.asarray(cu_q), cu_k=np.asarray(cu_k), **options)

    assert_follows(lambda arrays: call(arrays, cu_q, cu_k), oracle, arrays)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("D", "tokens"), [(64, 700), (128, 640), (128, 701), (256, 640)])
def test_what_lies_behind_the_last_sequence_reaches_nothing(D, tokens, deterministic):
    """NaN there, in the cotangent too: the bits are those without, but in dQ, and there they are zeros."""
    cu, used = cu_seqlens(200, 0, 241), 441
    arrays = packed(0, jnp.bfloat16, Tq=tokens, D=D, H=4, Hk=2)
    arrays["out"] = packed(1, jnp.bfloat16, Tq=tokens, D=D, H=4, Hk=2)["q"]

    @jax.jit
    def run(arrays, cu):
        call = functools.partial(flash_attention_varlen, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
        call = functools.partial(call, deterministic=deterministic, implementation="hopper")
        out, pull = jax.vjp(call, *(arrays[name] for name in "qkv"))
        return dict(zip(("out", "dq", "dk", "dv"), (out, *pull(arrays["out"])), strict=True))

    clean = run(arrays, cu)
    found = run({name: x.at[used:].set(jnp.nan) for name, x in arrays.items()}, cu)
    for name, x in found.items():
        x, y = (np.asarray(z, np.float32) for z in (x, clean[name]))
        np.testing.assert_allclose(x, y, atol=2e-2 if name == "dq" and not deterministic else 0, err_msg=name)
        assert (x[used:] == 0).all(), name


def test_vmap_with_lengths_of_each():
    arrays = packed(2, jnp.bfloat16, Tq=400, D=64, H=2, Hk=2)
    cus = jnp.stack([cu_seqlens(400, 0), cu_seqlens(130, 201)])
    one = jax.jit(
        lambda arrays, cu: flash_attention_varlen(
            **arrays, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, implementation="hopper"
        )
    )
    both = jax.jit(jax.vmap(one, in_axes=(None, 0)))(arrays, cus)
    for n in range(2):
        np.testing.assert_array_equal(np.asarray(both[n], np.float32), np.asarray(one(arrays, cus[n]), np.float32))

"""Packed sequences: each as if alone, whatever lies around it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import LinearAttentionState, linear_attention
from tests.linear.rule import assert_matches_oracle, everything, inputs

CU = (0, 1, 2, 30, 30, 47, 66)  # two of one token, an empty one; tokens 66 to 69 belong to none
N, S = len(CU) - 1, 70


@pytest.mark.parametrize(("decay", "reverse"), [(None, False), ("head", False), ("token", False), ("token", True)])
def test_packed(decay, reverse):
    arrays = inputs(B=1, S=S, N=N, decay=decay, state=True)
    assert_matches_oracle(arrays, cu_seqlens=jnp.asarray(CU), reverse=reverse, chunk_size=16)


@pytest.mark.parametrize(("decay", "normalize"), [(None, False), ("token", True)])
def test_packed_both_sides(decay, normalize):
    arrays = inputs(B=1, S=S, decay=decay, positive=normalize)
    assert_matches_oracle(arrays, cu_seqlens=jnp.asarray(CU), causal=False, normalize=normalize, chunk_size=16)


def test_packed_normalized_in_bfloat16():
    arrays = inputs(dtype=jnp.bfloat16, B=1, S=S, N=N, decay="head", state=True, positive=True)
    assert_matches_oracle(arrays, cu_seqlens=jnp.asarray(CU), normalize=True, chunk_size=16)


def test_each_sequence_as_if_alone():
    arrays = inputs(B=1, S=S, N=N, decay="token", state=True, Hq=2, Hk=1)
    out, state = linear_attention(**arrays, cu_seqlens=jnp.asarray(CU), return_state=True, chunk_size=16)
    for n, (start, end) in enumerate(itertools.pairwise(CU)):
        alone = {name: arrays[name][:, start:end] for name in ("q", "k", "v", "log_decay")}
        before = LinearAttentionState(arrays["initial_state"].kv[n : n + 1])
        expected, after = linear_attention(**alone, initial_state=before, return_state=True, chunk_size=16)
        np.testing.assert_allclose(out[:, start:end], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.kv[n : n + 1], after.kv, rtol=1e-4, atol=1e-4)
    assert not out[:, CU[-1] :].any()


@pytest.mark.parametrize("options", [{"normalize": True}, {"causal": False}], ids=str)
def test_tokens_outside_are_not_read(options):
    """NaN after the last sequence changes nothing, and gets no gradient."""
    arrays = inputs(B=1, S=S, decay="token", positive=True)
    poisoned = {name: x.at[:, CU[-1] :].set(jnp.nan) for name, x in arrays.items()}
    options = {**options, "cu_seqlens": jnp.asarray(CU), "implementation": "xla", "chunk_size": 16}
    clean, found = (everything(linear_attention, a, **options) for a in (arrays, poisoned))
    for name, x in clean.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    for name in ("out", "dq", "dk", "dv", "dlog_decay"):
        assert not found[name][:, CU[-1] :].any(), name


@pytest.mark.parametrize("cu", [(0, 70), (0, 0, 0), tuple(range(33))], ids=lambda cu: f"{len(cu) - 1}")
def test_other_packings(cu):
    arrays = inputs(B=1, S=S, N=len(cu) - 1, decay="head", state=True)
    assert_matches_oracle(arrays, cu_seqlens=jnp.asarray(cu), chunk_size=16)


def test_lengths_may_change_under_jit():
    arrays = inputs(B=1, S=S, decay="token")
    run = jax.jit(lambda cu: linear_attention(**arrays, cu_seqlens=cu, implementation="xla"))
    for cu in ((0, 10, 70), (0, 0, 3)):
        expected = linear_attention(**arrays, cu_seqlens=jnp.asarray(cu), implementation="reference")
        np.testing.assert_allclose(run(jnp.asarray(cu)), expected, rtol=1e-4, atol=1e-4)
    assert run._cache_size() == 1

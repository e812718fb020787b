"""The decode kernel against the oracle, on the device. Whatever no query sees is NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention_with_kvcache
from tests.oracle import inputs
from tests.varlen.caches import assert_decodes

RAGGED = (1000, 1, 513, 0)
SLOPES = 2.0 ** -jnp.arange(1.0, 9.0)
EACH_SLOPES = jnp.stack([SLOPES, -SLOPES])
CASES = {
    "one_query": dict(lengths=RAGGED, H=8, Hk=2, D=128),
    "one_query_D64": dict(lengths=RAGGED, H=8, Hk=2, D=64),
    "every_head_its_own": dict(lengths=(700, 64), H=6, D=128),
    "many_splits": dict(lengths=(9000,), H=4, Hk=1, D=128, room=1000),
    "causal": dict(lengths=RAGGED, Sq=4, H=8, Hk=2, D=128, causal=True),
    "many_rows": dict(lengths=(999, 130), Sq=16, H=16, Hk=2, D=64, causal=True, room=13),
    "leftpad": dict(lengths=(650, 80, 300), leftpad=(100, 80, 299), Sq=2, H=2, Hk=1, D=128, causal=True),
    "window": dict(lengths=(900, 100), Sq=3, H=4, Hk=2, D=64, window=(200, 0), softcap=3.0),
    "window_ahead": dict(lengths=(900, 100), Sq=7, H=4, Hk=2, D=128, window=(64, 2), scale=0.3),
    "sinks": dict(lengths=RAGGED, H=4, Hk=2, D=128, sinks=True),
    "alibi": dict(lengths=RAGGED, H=8, Hk=2, D=128, alibi_slopes=SLOPES),
    "alibi_of_each": dict(lengths=(900, 70), leftpad=(20, 0), Sq=3, H=8, D=64, causal=True, alibi_slopes=EACH_SLOPES),
    "alibi_softcap": dict(lengths=RAGGED, Sq=9, H=8, Hk=1, D=128, causal=True, softcap=3.0, alibi_slopes=SLOPES),
    "float16": dict(lengths=RAGGED, Sq=2, H=4, Hk=2, D=128, dtype=jnp.float16, causal=True),
    "short_cache": dict(lengths=(20, 5), H=2, D=64),
    "pages_of_8": dict(lengths=RAGGED, H=4, Hk=2, D=128, page=8, room=40),
    "pages_of_16": dict(lengths=RAGGED, Sq=3, H=8, Hk=2, D=128, page=16, causal=True),
    "pages_of_16_D64": dict(lengths=RAGGED, H=4, Hk=2, D=64, page=16),
    "pages_of_64": dict(lengths=RAGGED, H=8, Hk=2, D=128, page=64),
    "pages_of_256": dict(lengths=RAGGED, Sq=2, H=8, Hk=2, D=64, page=256, causal=True),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name):
    assert_decodes(**CASES[name])


@pytest.mark.parametrize("page", [None, 16])
def test_step_by_step_writes_in_place_and_repeats(page):
    """A donated step: the same memory, and the same bits twice."""
    k, v = (x[:, :, :2] for x in list(inputs(0, jnp.bfloat16, B=2, Sq=640, H=2, D=128).values())[1:])
    q = inputs(1, jnp.bfloat16, B=2, Sq=8, H=8, D=128)["q"]
    shape = (2, 640, 2, 128) if page is None else (80, page, 2, 128)
    layout = (
        {} if page is None else {"block_table": jnp.asarray(np.random.default_rng(0).permutation(80).reshape(2, 40))}
    )
    step = functools.partial(flash_attention_with_kvcache, causal=True, implementation="hopper", **layout)
    step = jax.jit(step, donate_argnames=("k_cache", "v_cache"))

    def generate():
        caches, outs = [jnp.full(shape, jnp.nan, jnp.bfloat16) for _ in range(2)], []
        where = [x.unsafe_buffer_pointer() for x in caches]
        out, *caches = step(q[:, :1], *caches, k[:, :600], v[:, :600], cache_seqlens=jnp.zeros(2, jnp.int32))
        for n in range(8):
            at, token = slice(600 + n, 601 + n), slice(n, n + 1)
            out, *caches = step(q[:, token], *caches, k[:, at], v[:, at], cache_seqlens=jnp.full(2, 600 + n, jnp.int32))
            outs.append(out)
        assert [x.unsafe_buffer_pointer() for x in caches] == where
        return jnp.concatenate(outs, axis=1)

    first = generate()
    assert jnp.isfinite(first).all()
    assert jnp.array_equal(first, generate())

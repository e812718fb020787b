"""The decode kernel in the interpreter: numbers, barriers and races. Whatever no query sees is NaN."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jflash import flash_attention_with_kvcache
from pallas_kernels.hopper import decode
from tests.kernels.calls import on_hopper
from tests.kernels.interpreted import interpreted
from tests.kernels.test_attention import OLD
from tests.varlen.caches import assert_decodes

SLOPES = jnp.array([0.5, 0.1, 0.02, 0.004])
CASES = {
    "one_query": dict(lengths=(300, 70), H=4, Hk=2, D=128),
    "causal": dict(lengths=(330,), Sq=3, H=4, Hk=1, D=64, causal=True),
    "many_rows": dict(lengths=(200,), Sq=9, H=8, Hk=1, D=64, causal=True, room=7),
    "empty_entries": dict(lengths=(0, 3), H=2, D=64, room=200),
    "leftpad": dict(lengths=(250, 80), leftpad=(100, 80), Sq=2, H=2, Hk=1, D=64, causal=True),
    "window": dict(lengths=(400,), Sq=2, H=2, Hk=1, D=64, window=(100, 0), softcap=3.0),
    "sinks": dict(lengths=(150, 0), H=4, Hk=2, D=64, sinks=True),
    "alibi": dict(lengths=(150, 70), leftpad=(20, 0), Sq=3, H=4, Hk=2, D=64, causal=True, alibi_slopes=SLOPES),
    "alibi_softcap": dict(lengths=(150, 70), H=4, Hk=2, D=64, softcap=3.0, alibi_slopes=jnp.stack([SLOPES, -SLOPES])),
    "small_pages": dict(lengths=(150, 33), H=2, Hk=1, D=128, page=16, room=40),
    "pages": dict(lengths=(150, 33), H=2, Hk=1, D=64, page=64),
    "large_pages": dict(lengths=(150, 300), H=2, Hk=1, D=64, page=256),
    "float16": dict(lengths=(150,), H=1, D=128, dtype=jnp.float16),
    "short_cache": dict(lengths=(20, 5), H=2, D=64),
}


SLOW = {"window", "alibi_softcap", "pages", "large_pages", "float16", "short_cache"}
SHAPES = {
    "D128": {},
    "D64": dict(D=64, Sq=4, causal=True),
    "odd": dict(Sc=4099, softcap=20.0),
    "D128_alibi": dict(Sq=4, causal=True, alibi_slopes=jnp.ones(32)),
    "D128_pages": dict(page=16),
    "D64_pages": dict(page=256, D=64, dtype=jnp.float16),
}


def call_on_shapes(*, B=16, Sq=1, H=32, Hk=8, D=128, Sc=4096, page=None, dtype=jnp.bfloat16, **options):
    """A call of the kernel, and the shapes of its arguments."""

    def run(q, k_cache, v_cache, lengths, table):
        layout = dict(cache_seqlens=lengths, block_table=table)
        return flash_attention_with_kvcache(q, k_cache, v_cache, **layout, **options, implementation="hopper")[0]

    array = jax.ShapeDtypeStruct
    cached = array((B, Sc, Hk, D) if page is None else (B * Sc // page, page, Hk, D), dtype)
    table = None if page is None else array((B, Sc // page), jnp.int32)
    return run, (array((B, Sq, H, D), dtype), cached, cached, array((B,), jnp.int32), table)


def decoding_on_the_cpu():
    return interpreted((decode, "decode"))


@pytest.mark.skipif(OLD, reason="slow on this JAX")
@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in CASES])
def test_matches_oracle(name):
    with decoding_on_the_cpu():
        assert_decodes(**CASES[name])


@pytest.mark.parametrize("name", ["D64", "D128_pages"])
def test_lowers_under_vmap(name):
    run, shapes = call_on_shapes(**SHAPES[name])
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), shapes)
    with on_hopper():
        text = jax.jit(jax.vmap(run)).trace(*stacked).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("name", SHAPES)
def test_lowers(name):
    run, shapes = call_on_shapes(**SHAPES[name])
    with on_hopper():
        text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("D", decode.TILES)
def test_ctas_share_the_memory_of_an_sm(D):
    tile = decode.TILES[D]
    needed = 2 * decode.ROWS * D * (1 + 2 * tile.stages) + 128
    assert tile.ctas * (needed + 1024) <= 228 * 1024


@pytest.mark.parametrize(("tiles", "blocks", "expected"), [(256, 64, 1), (128, 64, 2), (8, 8, 2)])
def test_splits_fill_the_gpu(tiles, blocks, expected):
    assert decode.split_count(tiles, blocks, 264) == expected


def test_reasons():
    call = functools.partial(flash_attention_with_kvcache, cache_seqlens=3, implementation="hopper")
    q, pages = jnp.zeros((1, 1, 2, 64), jnp.bfloat16), jnp.zeros((3, 12, 2, 64), jnp.bfloat16)
    with on_hopper(), pytest.raises(NotImplementedError, match="page=12 must be"):
        call(q, pages, pages, block_table=jnp.zeros((1, 2), jnp.int32))

"""Compiles the decode kernel for an H100: no spills, no serialized wgmma, and registers for CTAs that share an SM."""

import jax
import jax.numpy as jnp
import pytest

from jflash import flash_attention_with_kvcache
from pallas_kernels.hopper import decode
from tests.kernels.calls import on_hopper
from tests.kernels.h100 import compile_for_h100
from tests.kernels.test_compile import _needs_the_compiler  # noqa: F401 (it is of every test)
from tests.kernels.test_decode import proven

pytestmark = pytest.mark.compile
COMPILED = {
    "D128": {},
    "D64": dict(D=64, Sq=4, causal=True),
    "odd": dict(Sc=4099, softcap=20.0),
    "D128_pages": dict(page=16),
    "D64_pages": dict(page=256, D=64, dtype=jnp.float16),
}


@pytest.mark.parametrize("name", COMPILED)
def test_ptxas_has_no_complaint(name):
    kernel = compiled(**COMPILED[name])
    assert kernel.serialized is None
    assert kernel.spill_bytes == 0
    assert kernel.registers * 128 * decode.TILES[COMPILED[name].get("D", 128)].ctas <= 65536


def compiled(*, B=16, Sq=1, H=32, Hk=8, D=128, Sc=4096, page=None, dtype=jnp.bfloat16, **options):
    array = jax.ShapeDtypeStruct
    cached = array((B, Sc, Hk, D) if page is None else (B * Sc // page, page, Hk, D), dtype)
    table = None if page is None else array((B, Sc // page), jnp.int32)

    def run(q, k_cache, v_cache, lengths, table):
        layout = dict(cache_seqlens=lengths, block_table=table)
        return flash_attention_with_kvcache(q, k_cache, v_cache, **layout, **options, implementation="hopper")[0]

    with on_hopper(), proven():
        _, (kernel,) = compile_for_h100(run, array((B, Sq, H, D), dtype), cached, cached, array((B,), jnp.int32), table)
    return kernel

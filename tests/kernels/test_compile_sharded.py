"""Compiles calls for four H100s: each launches the kernels on its part, and nothing moves between them."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jflash import flash_attention, flash_attention_with_kvcache, l1_attention, linear_attention
from jflash.parallel import ring_attention
from tests.kernels.calls import on_hopper
from tests.kernels.h100 import h100s

pytestmark = pytest.mark.compile
B, S, H, D = 4, 128, 8, 64
COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
CALLS = {
    "attention": lambda *qkv: flash_attention(*qkv, causal=True),
    "linear": linear_attention,
    "l1": lambda *qkv: l1_attention(*qkv, causal=True),
}


def compiled(function, axes: P, count: int) -> str:
    """The program of each device for `count` arrays [B, S, H, D], split along some axes."""
    mesh = h100s(4)
    x = jax.ShapeDtypeStruct((B, S, H, D), jnp.bfloat16, sharding=NamedSharding(mesh, axes))
    with on_hopper(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*[x] * count).lower(lowering_platforms=("cuda",)).compile().as_text() or ""


def check(text: str, least: int) -> None:
    assert text.count('custom_call_target="mosaic_gpu_v2"') >= least, text
    assert f"bf16[{B},{S},{H},{D}]" not in text  # the whole is on no device
    assert COLLECTIVES.search(text) is None


def gradients(name: str, axes: P) -> str:
    def run(q, k, v, d_out):
        out, pull = jax.vjp(CALLS[name], q, k, v)
        return out, pull(d_out)

    return compiled(run, axes, 4)


@pytest.mark.parametrize("axes", [P("x"), P(None, None, "x")], ids=["batch", "heads"])
def test_attention(axes):
    check(gradients("attention", axes), least=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "l1"])
def test_other_families(name):
    check(gradients(name, P("x")), least=2)


def test_heads_of_a_cache():
    def run(q, k, v):
        return flash_attention_with_kvcache(q[:, :1], k, v, k[:, :1], v[:, :1], cache_seqlens=17)[0]

    check(compiled(run, P(None, None, "x"), 3), least=1)


def test_ring():
    """The kernels inside shard_map, and chunks of keys that go round."""

    def run(q, k, v, d_out):
        ring = functools.partial(ring_attention, axis_name="x", causal=True, implementation="hopper")
        out, pull = jax.vjp(ring, q, k, v)
        return out, pull(d_out)

    parts = P(None, "x")
    text = compiled(jax.shard_map(run, mesh=h100s(4), in_specs=parts, out_specs=parts), parts, 4)
    assert text.count('custom_call_target="mosaic_gpu_v2"') >= 4
    assert set(COLLECTIVES.findall(text)) == {"collective-permute"}

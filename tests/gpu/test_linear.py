"""The Hopper kernels of linear attention against the oracle, on the device."""

import jax
import jax.numpy as jnp
import pytest

from jflash import linear_attention
from tests.linear.rule import assert_matches_oracle, inputs

CASES = {
    "plain": (dict(B=2, S=1024, Hq=4, D=128), {}),
    "head": (dict(B=2, S=1024, Hq=6, D=128, decay="head", strength=0.05, state=True), {}),
    "token": (dict(B=2, S=1000, Hq=3, D=128, decay="token", strength=0.1, state=True), {}),
    "D64": (dict(B=2, S=1024, Hq=4, D=64, decay="token", strength=0.02), {}),
    "D64_odd": (dict(B=3, S=777, Hq=6, D=64, decay="head", strength=0.02, state=True), {}),
    "D256": (dict(B=1, S=500, Hq=2, D=256, decay="token", state=True), {}),
    "D192": (dict(B=1, S=300, Hq=6, D=192, decay="head"), {}),
    "long": (dict(B=1, S=4096, Hq=1, D=64, decay="token", strength=0.01), {}),
    "strong": (dict(B=1, S=500, Hq=2, D=128, decay="token", strength=30.0), {}),
    "reverse": (dict(B=2, S=700, Hq=2, D=128, decay="token", strength=0.1, state=True), dict(reverse=True)),
    "grouped": (dict(B=2, S=500, Hq=6, Hk=3, D=128, decay="head", strength=0.1), {}),
    "shared_values": (dict(B=1, S=333, Hq=1, Hk=1, Hv=4, D=64, decay="token", state=True), {}),
    "head_dims": (dict(B=2, S=90, Hq=6, D=40, Dv=100, decay="head", state=True), dict(scale=-1.5)),
    "wide_values": (dict(B=1, S=200, Hq=2, D=64, Dv=256, decay="token"), {}),
    "uneven_values": (dict(B=1, S=200, Hq=2, D=128, Dv=192, decay="token", state=True), {}),
    "short": (dict(B=2, S=3, Hq=2, D=64, decay="token"), {}),
    "few": (dict(B=2, S=2048, Hq=2, Hk=1, D=128, decay="token", strength=0.01, state=True), {}),
    "few_reverse": (dict(B=1, S=2048, Hq=2, D=64, decay="head", strength=0.01), dict(reverse=True)),
    "many": (dict(B=8, S=130, Hq=40, D=64, decay="token"), {}),
    "many_D128": (dict(B=4, S=500, Hq=20, Hk=10, D=128, decay="head", strength=0.1, state=True), {}),
    "few_ragged": (dict(B=1, S=4001, Hq=3, D=64, decay="token", strength=0.01, state=True), {}),
    "few_D128": (dict(B=1, S=4096, Hq=4, D=128, decay="token", strength=0.01, state=True), {}),
    "normalized": (dict(B=2, S=1000, Hq=4, D=128, decay="token", state=True, positive=True), dict(normalize=True)),
    "normalized_plain": (dict(B=2, S=1024, Hq=4, Hk=2, D=64, Dv=128, positive=True), dict(normalize=True)),
    "full": (dict(B=2, S=1000, Sk=777, Hq=4, Hk=2, D=128, Dv=64), dict(causal=False)),
    "full_few": (dict(B=1, S=4096, Hq=2, D=128), dict(causal=False)),
    "full_normalized": (dict(B=2, S=700, Hq=4, D=64, positive=True), dict(causal=False, normalize=True)),
    "both_ways": (dict(B=2, S=700, Hq=4, D=128, decay="token", strength=0.1), dict(causal=False)),
    "both_ways_D256": (dict(B=1, S=500, Hq=4, D=256, decay="head", strength=0.1), dict(causal=False)),
}
PACKED = {
    "plain": (dict(Hq=4, D=128), {}),
    "head": (dict(Hq=8, Hk=2, D=128, decay="head", strength=0.1), {}),
    "token_reverse": (dict(Hq=4, D=64, decay="token", strength=0.1), dict(reverse=True)),
    "normalized": (dict(Hq=4, D=128, decay="token", strength=0.1, positive=True), dict(normalize=True)),
    "both_ways": (dict(Hq=4, D=256, decay="token", strength=0.1), dict(causal=False)),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name):
    shape, options = CASES[name]
    assert_matches_oracle(inputs(0, jnp.bfloat16, **shape), "hopper", **options)


@pytest.mark.parametrize("name", PACKED)
def test_packed(name):
    """Sequences of one token, of none, across chunks, and NaN behind the last."""
    shape, options = PACKED[name]
    arrays = inputs(3, jnp.bfloat16, B=1, S=3000, **shape)
    options |= {"cu_seqlens": jnp.asarray([0, 1, 2, 40, 40, 1100, 1101, 2900])}

    def attend(**arguments):
        there = (x for x in ("q", "k", "v", "log_decay") if getattr(arguments.get(x), "ndim", 1) > 1)
        return linear_attention(**arguments | {x: arguments[x].at[:, 2900:].set(jnp.nan) for x in there})

    assert_matches_oracle(arrays, "hopper", attend, return_state=False, **options)


def test_gives_the_same_bits_100_times():
    arrays = inputs(1, jnp.bfloat16, B=2, S=900, Hq=8, D=128, decay="token", state=True)

    @jax.jit
    def run(arrays):
        out, pull = jax.vjp(lambda a: linear_attention(**a, implementation="hopper"), arrays)
        return out, pull(jnp.sin(3 * out.astype(jnp.float32)).astype(out.dtype))

    first = jax.tree.leaves(run(arrays))
    for n in range(100):
        assert all(jnp.array_equal(x, y) for x, y in zip(first, jax.tree.leaves(run(arrays)), strict=True)), n


def test_vmap_is_a_loop():
    arrays = [inputs(seed, jnp.bfloat16, B=2, S=300, Hq=2, D=64, decay="token") for seed in range(2)]
    f = lambda a: linear_attention(**a, implementation="hopper")  # noqa: E731
    mapped = jax.jit(jax.vmap(f))(jax.tree.map(lambda *x: jnp.stack(x), *arrays))
    for one, found in zip(arrays, mapped, strict=True):
        assert jnp.array_equal(jax.jit(f)(one), found)


MASKED = {
    "two_heads": (dict(B=2, S=512, Hq=4, D=64, mask=(1, 1, 512, 512)), {}),
    "many": (dict(B=16, S=256, Hq=12, D=64, mask=(1, 1, 256, 256)), {}),
    "D128": (dict(B=2, S=512, Hq=4, D=128, mask=(1, 1, 512, 512)), {}),
    "D128_float32": (dict(B=1, S=300, Sk=700, Hq=3, D=128, mask=(1, 3, 300, 700)), dict(scale=-0.5)),
    "D64_float32": (dict(B=2, S=300, Sk=700, Hq=3, D=64, mask=(2, 1, 300, 700)), {}),
    "of_heads": (dict(B=4, S=384, Hq=3, D=64, mask=(1, 3, 384, 384)), {}),
    "of_each": (dict(B=2, S=640, Hq=3, D=128, mask=(2, 3, 640, 640)), {}),
    "ragged": (dict(B=2, S=333, Sk=457, Hq=3, D=64, mask=(1, 1, 333, 457)), {}),
    "ragged_D128": (dict(B=1, S=333, Sk=457, Hq=2, D=128, mask=(1, 2, 333, 457)), {}),
    "grouped": (dict(B=2, S=200, Hq=6, Hk=3, D=64, mask=(1, 1, 200, 200)), {}),
    "shared_values": (dict(B=1, S=130, Hq=1, Hk=1, Hv=4, D=128, mask=(1, 4, 130, 130)), {}),
    "head_dims": (dict(B=2, S=90, Hq=6, D=40, Dv=56, mask=(1, 1, 90, 90)), {}),
    "long": (dict(B=1, S=4096, Hq=2, D=64, mask=(1, 1, 4096, 4096)), {}),
    "short": (dict(B=2, S=3, Sk=5, Hq=2, D=64, mask=(1, 1, 3, 5)), {}),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_matches_oracle(name):
    shape, options = MASKED[name]
    arrays = inputs(0, jnp.bfloat16, **shape)
    if name.endswith("float32"):
        arrays["mask"] = arrays["mask"].astype(jnp.float32)
    assert_matches_oracle(arrays, "hopper", **options)


@pytest.mark.parametrize("D", [64, 128])
def test_boolean_mask_in_float16(D):
    arrays = inputs(0, jnp.float16, B=2, S=400, Hq=2, D=D)
    arrays["mask"] = jax.random.bernoulli(jax.random.key(1), 0.6, (1, 2, 400, 400))
    assert_matches_oracle(arrays, "hopper")


@pytest.mark.parametrize("D", [64, 128])
def test_masked_gives_the_same_bits_but_for_dq(D):
    """dq is added up in whatever order CTAs come."""
    arrays = inputs(1, jnp.bfloat16, B=2, S=900, Hq=8, D=D, mask=(1, 1, 900, 900))

    @jax.jit
    def run(arrays):
        out, pull = jax.vjp(lambda a: linear_attention(**a, implementation="hopper"), arrays)
        (grads,) = pull(jnp.sin(3 * out.astype(jnp.float32)).astype(out.dtype))
        return out, grads

    first, grads = run(arrays)
    for n in range(100):
        out, again = run(arrays)
        assert jnp.array_equal(first, out), n
        assert all(jnp.array_equal(grads[name], again[name]) for name in ("k", "v", "mask")), n


def test_masked_stores_no_weights():
    """Temporary memory stays far below one number for each weight."""
    B, S, H = 4, 2048, 8
    q = jax.ShapeDtypeStruct((B, S, H, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 1, S, S), jnp.bfloat16)

    def run(q, k, v, mask, d_out):
        return jax.vjp(lambda *x: linear_attention(*x[:3], mask=x[3], implementation="hopper"), q, k, v, mask)[1](d_out)

    used = jax.jit(run).lower(q, q, q, mask, q).compile().memory_analysis().temp_size_in_bytes
    assert used < B * H * S * S // 2

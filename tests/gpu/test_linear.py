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
}


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name):
    shape, options = CASES[name]
    assert_matches_oracle(inputs(0, jnp.bfloat16, **shape), "hopper", **options)


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

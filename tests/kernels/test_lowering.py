"""Lowers each kernel for a GPU, which needs none: shapes, layouts and the API of this JAX are right."""

import jax
import jax.numpy as jnp
import pytest

from jflash import flash_attention, l1_attention, linear_attention
from tests.kernels.calls import CALLS, cases, forward_and_backward, on_hopper, shapes


def lowered(function, *arguments) -> str:
    with on_hopper():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", cases())
def test_lowers(name):
    shape, options = CALLS[name]
    text = lowered(forward_and_backward(options), *shapes(**shape))
    assert text.count("custom_call @mosaic_gpu") == 4  # forward, delta, backward, dq


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_masked_linear_attention_lowers(dtype, heads):
    """JAX 0.12 lets no kernel write 16 bits by halves of sectors, 0.10 no role ask which CTA of a cluster it is in."""

    def both(q, k, v, mask):
        out, pull = jax.vjp(
            lambda q, k, v, mask: linear_attention(q, k, v, mask=mask, implementation="hopper"), q, k, v, mask
        )
        return pull(out)

    x, mask = jax.ShapeDtypeStruct((4, 512, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((heads, heads, 512, 512), dtype)
    assert lowered(both, x, x, x, mask).count("custom_call @mosaic_gpu") == 4  # forward, dQ dK dV, its dQ, dM


def test_lowers_under_x64():
    with jax.enable_x64(True):
        lowered(forward_and_backward(dict(causal=True)), *shapes(D=128, S=1001, sinks=True))


@pytest.mark.parametrize(
    ("attend", "name", "shape"),
    [
        (flash_attention, "sinks", (2,)),
        (flash_attention, "bias", (1, 2, 128, 128)),
        (l1_attention, "sink", (2,)),
        (linear_attention, "log_decay", (1, 128, 2)),
    ],
)
def test_a_gradient_in_float64(attend, name, shape):
    """Of what is float64 under x64 beside 16-bit inputs."""
    with jax.enable_x64(True), on_hopper():
        x, more = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct(shape, jnp.float64)
        call = lambda x, more: attend(x, x, x, **{name: more}, implementation="hopper").sum()  # noqa: E731
        found = jax.eval_shape(jax.grad(call, argnums=(0, 1)), x, more)
    assert [y.dtype for y in found] == [jnp.bfloat16, jnp.float64]


def test_lowers_under_vmap():
    def stacked(x):
        return jax.ShapeDtypeStruct((3, *x.shape), x.dtype)

    run = jax.vmap(forward_and_backward({}), in_axes=(0, None, 0, 0))
    lowered(run, *jax.tree.map(stacked, shapes(D=64)))


def test_a_scale_that_is_not_finite_does_not_lower():
    with pytest.raises(ValueError, match="scale"):
        lowered(forward_and_backward(dict(scale=float("nan"))), *shapes(D=64))


def test_dtype_of_the_outputs():
    with on_hopper():
        out = jax.eval_shape(forward_and_backward({}), *shapes(D=64, dtype=jnp.float16))
    (value, lse), ((dq, dk, dv), _) = out
    assert {x.dtype for x in (value, dq, dk, dv)} == {jnp.dtype(jnp.float16)}
    assert lse.dtype == jnp.float32

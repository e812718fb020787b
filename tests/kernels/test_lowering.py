"""Lowers each kernel for a GPU, which needs none: shapes, layouts and the API of this JAX are right."""

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.calls import CALLS, cases, forward_and_backward, on_hopper, shapes


def lowered(function, *arguments) -> str:
    with on_hopper():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", cases())
def test_lowers(name):
    shape, options = CALLS[name]
    text = lowered(forward_and_backward(options), *shapes(**shape))
    assert text.count("custom_call @mosaic_gpu") == 4  # forward, delta, backward, dq


def test_lowers_under_x64():
    with jax.enable_x64(True):
        lowered(forward_and_backward(dict(causal=True)), *shapes(D=128, S=1001, sinks=True))


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

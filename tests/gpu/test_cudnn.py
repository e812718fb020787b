"""cuDNN as a backend, on the device: its forward, its backward, and a backward with a gradient through lse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention
from tests.oracle import assert_matches_oracle, inputs

CASES = {
    "full": (dict(B=2, Sq=512, H=4, D=128), {}),
    "causal": (dict(B=2, Sq=510, H=4, Hk=2, D=64), dict(causal=True)),
    "window": (dict(B=2, Sq=700, H=2, D=128), dict(window=(100, 0))),
    "more_keys": (dict(B=1, Sq=100, Sk=334, H=2, D=96), {}),
    "odd": (dict(B=2, Sq=509, H=4, Hk=2, D=64), dict(causal=True)),
    "D256": (dict(B=1, Sq=300, H=2, D=256), dict(causal=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name):
    shape, options = CASES[name]
    assert_matches_oracle(inputs(0, jnp.bfloat16, **shape), options, "cudnn")


@pytest.mark.parametrize("name", CASES)
def test_its_own_backward_matches_that_of_xla(name):
    """No cotangent for lse, so this is cuDNN's backward, but for odd lengths."""
    shape, options = CASES[name]
    x = inputs(1, jnp.bfloat16, **shape)
    d_out = np.random.default_rng(2).normal(size=(*x["q"].shape[:3], shape["D"]))

    def gradients(implementation):
        def loss(x):
            out = flash_attention(**x, **options, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32) * d_out)

        return jax.jit(jax.grad(loss))(x)

    found, expected = gradients("cudnn"), gradients("xla")
    for name in found:
        ours, theirs = (np.asarray(grads[name], np.float64) for grads in (found, expected))
        assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.01 * np.sqrt(np.mean(theirs**2)), name

"""The JAX side of `interop.layers`. Imports JAX, so imported at the first call. Dense weights are torch's, [O, I]."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jflash import layers

FUNCTIONS = {
    "rms_norm": lambda x, w, b, residual, **options: layers.rms_norm(x, w, b, residual=residual, **options),
    "layer_norm": lambda x, w, b, residual, **options: layers.layer_norm(x, w, b, residual=residual, **options),
    "cross_entropy": layers.cross_entropy,
    "dense": lambda x, w, b: layers.dense(x, w.T, b),
    "mlp": lambda x, w1, w2, b1, b2, **options: layers.mlp(x, w1.T, w2.T, b1, b2, **options),
}


def _outputs(name: str, options: tuple, arrays) -> list[jax.Array]:
    return jax.tree.leaves(FUNCTIONS[name](*arrays, **dict(options)))


@functools.partial(jax.jit, static_argnames=("name", "options"))
def forward(*arrays, name: str, options: tuple):
    """The outputs of a function of `jflash.layers`; an array may be None."""
    return _outputs(name, options, arrays)


@functools.partial(jax.jit, static_argnames=("name", "options", "outputs"))
def backward(*arrays, name: str, options: tuple, outputs: int):
    """Gradients of the arrays of a floating type, from as many cotangents as outputs, and then the arrays."""
    cotangents, arrays = list(arrays[:outputs]), arrays[outputs:]
    places = [i for i, x in enumerate(arrays) if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]

    def run(inputs):
        mine = dict(zip(places, inputs, strict=True))
        return _outputs(name, options, [mine.get(i, x) for i, x in enumerate(arrays)])

    _, pull = jax.vjp(run, [arrays[i] for i in places])
    return pull(cotangents)[0]

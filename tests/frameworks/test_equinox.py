"""An Equinox model: per example, batched by vmap alone, differentiated by filter_grad."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention
from tests.frameworks.rule import random

eqx = pytest.importorskip("equinox")

B, S, FEATURES, HEADS, KV_HEADS = 3, 29, 24, 4, 2


def plain_attention(q, k, v, *, causal, bias, mask):
    """[1, S, H, D] with grouped heads, as its definition."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5 + bias
    seen = mask & jnp.tril(jnp.ones(scores.shape[-2:], bool)) if causal else mask
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


class Attention(eqx.Module):
    q: eqx.nn.Linear
    kv: eqx.nn.Linear
    out: eqx.nn.Linear
    bias: jax.Array
    attend: object = eqx.field(static=True)

    def __init__(self, attend, key):
        one, two, three, four = jax.random.split(key, 4)
        D = FEATURES // HEADS
        self.q = eqx.nn.Linear(FEATURES, FEATURES, key=one)
        self.kv = eqx.nn.Linear(FEATURES, 2 * KV_HEADS * D, key=two)
        self.out = eqx.nn.Linear(FEATURES, FEATURES, key=three)
        self.bias = jax.random.normal(four, (HEADS, S, S))
        self.attend = attend

    def __call__(self, x, visible):
        """x [S, FEATURES] of one example, visible [S] its keys."""
        q = jax.vmap(self.q)(x).reshape(1, S, HEADS, -1)
        k, v = jnp.split(jax.vmap(self.kv)(x).reshape(1, S, 2 * KV_HEADS, -1), 2, axis=2)
        out = self.attend(q, k, v, causal=True, bias=self.bias[None], mask=visible[None, None, None])
        return jax.vmap(self.out)(out.reshape(S, FEATURES))


def test_vmapped_model_and_its_gradients():
    x, cotangent = random(0, B, S, FEATURES), random(1, B, S, FEATURES)
    visible = np.arange(S) < np.array([[S], [11], [20]])

    @eqx.filter_jit
    def run(model):
        @functools.partial(eqx.filter_value_and_grad, has_aux=True)
        def loss(model):
            out = jax.vmap(model)(x, visible)
            return jnp.vdot(out, cotangent), out

        (_, out), gradients = loss(model)
        return [out, *jax.tree.leaves(eqx.filter(gradients, eqx.is_inexact_array))]

    theirs, ours = (run(Attention(f, jax.random.key(0))) for f in (plain_attention, flash_attention))
    assert len(theirs) == len(ours) == 8
    for a, b in zip(theirs, ours, strict=True):
        assert np.abs(a).max() > 0.1
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()

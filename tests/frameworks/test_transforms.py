"""flash_attention inside what frameworks wrap around it: rematerialisation, scanned layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jflash import flash_attention
from tests.frameworks.rule import random

ROOT = Path(__file__).parents[2]
B, S, H, D, LAYERS = 2, 31, 4, 16, 3


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_importing_jflash_imports_no_framework():
    code = "import jflash, sys; print([m for m in ('flax', 'equinox', 'torch') if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def layer(x, weight):
    """Residual self-attention with one weight for q, k and v, [3, H D, H D]."""
    q, k, v = (jnp.einsum("bsf,fg->bsg", x, w).reshape(B, S, H, D) for w in weight)
    return x + flash_attention(q, k, v, causal=True).reshape(x.shape)


def loss_and_gradients(run):
    x, weights = random(0, B, S, H * D), random(1, LAYERS, 3, H * D, H * D) / (H * D) ** 0.5
    cotangent = random(2, B, S, H * D)
    return jax.jit(jax.value_and_grad(lambda x, w: jnp.vdot(cotangent, run(x, w)), argnums=(0, 1)))(x, weights)


def one_by_one(x, weights):
    for weight in weights:
        x = layer(x, weight)
    return x


def scanned(layer):
    return lambda x, weights: jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]


def test_checkpoint_and_scan_over_layers_give_the_same():
    expected = jax.tree.leaves(loss_and_gradients(one_by_one))
    for run in (scanned(layer), scanned(jax.checkpoint(layer))):
        for a, b in zip(expected, jax.tree.leaves(loss_and_gradients(run)), strict=True):
            assert np.abs(a).max() > 0.1
            assert np.allclose(a, b, rtol=1e-4, atol=1e-5)

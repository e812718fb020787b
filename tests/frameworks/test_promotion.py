"""Under the strict rules of promotion that some users set, traced forward, backward and under vmap: nothing raises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import layers

B, S, H, D = 2, 5, 4, 8
LENGTHS = np.array([0, 2, 5])
X = jax.ShapeDtypeStruct((3, B, S, H, D), jnp.bfloat16)
TABLES = {"rotary_cos": jnp.ones((20, 2)), "rotary_sin": jnp.ones((20, 2))}
FEATURES = {"window": (2, 1), "softcap": 2.0, "alibi_slopes": jnp.ones(H), "mask": jnp.ones((S, S), bool)}
FEATURES |= {"sinks": jnp.ones(H), "bias": jnp.ones((H, 1, S))[None], "segment_ids": jnp.ones((B, S), int)}
FEATURES |= {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}


def packed(x):
    return jflash.flash_attention_varlen(
        x[0], x[0], x[0], cu_seqlens_q=LENGTHS, cu_seqlens_k=LENGTHS, causal=True, alibi_slopes=jnp.ones((2, H))
    )


def cached(x):
    x = jax.lax.stop_gradient(x)
    table = {"block_table": np.arange(4).reshape(2, 2), "cache_seqlens": np.array([3, 5])}
    pages = jnp.zeros((4, 8, H, D), x.dtype)
    return jflash.flash_attention_with_kvcache(x, pages, pages, x, x, causal=True, **table, **TABLES)[0]


def mamba(x):
    return jflash.mamba2_ssd(x, x[..., 0], -jnp.ones(H), x[:, :, :2], x[:, :, 2:])


CALLS = {
    "dense": lambda x: jflash.flash_attention(x, x, x, **FEATURES),
    "reference": lambda x: jflash.flash_attention(x, x, x, **FEATURES, implementation="reference"),
    "packed": packed,
    "cache": cached,
    "rotary": lambda x: jflash.apply_rotary(x, jnp.ones((20, 2)), jnp.ones((20, 2)), offsets=jnp.array([1, 2])),
    "linear": lambda x: jflash.retention(x, x, x, normalize=True),
    "mamba": mamba,
    "l1": lambda x: jflash.l1_attention_bidi(x, x, x, x, sink=0.0, causal=True),
    "sparse": lambda x: jflash.l1_attention_sparse(x, x, x, np.array([[0, 1], [2, 3]])),
    "norm": lambda x: layers.layer_norm(x, jnp.ones(D), jnp.ones(D), residual=x),
    "mlp": lambda x: layers.mlp(x, jnp.ones((D, 3), x.dtype), jnp.ones((3, D), x.dtype), jnp.ones(3), jnp.ones(D)),
    "loss": lambda x: layers.cross_entropy(x, jnp.zeros((B, S, H), int), label_smoothing=0.1),
}


@pytest.mark.parametrize("name", CALLS)
def test_strict_promotion(name):
    def total(x):
        return sum(y.sum(dtype=jnp.float32) for y in jax.tree.leaves(CALLS[name](x)))

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(jax.vmap(jax.jit(jax.grad(total))), X)

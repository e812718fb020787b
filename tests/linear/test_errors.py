"""Each rule that an argument can break, by the message that names it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import LinearAttentionState, linear_attention, linear_attention_step, mamba2_ssd, simple_gla

X = jnp.ones((2, 8, 4, 16))
ONE = X[:1]
G = -jnp.ones(4)
MASK = jnp.ones((1, 1, 8, 8))
STATE = LinearAttentionState(jnp.ones((2, 4, 16, 16)))

BAD = {
    "log_decay max=0.5 must be <= 0": {"log_decay": G.at[2].set(0.5)},
    "log_decay.shape=(3,) must be [H]=[4] or [B, S, H]=[2, 8, 4]": {"log_decay": G[:3]},
    "log_decay.dtype=int32 must be floating point": {"log_decay": jnp.zeros(4, jnp.int32)},
    "causal=True with a mask": {"mask": MASK, "causal": True},
    "log_decay with a mask must be None": {"mask": MASK, "log_decay": G},
    "initial_state with a mask": {"mask": MASK, "initial_state": STATE},
    "reverse with a mask": {"mask": MASK, "reverse": True},
    "mask.dtype=int32 must be bool or floating point": {"mask": MASK.astype(jnp.int32)},
    "mask.shape=(1, 1, 8, 7) must be [B|1, H|1, Sq|1, Sk|1] for [B, H, Sq, Sk]=[2, 4, 8, 8]": {"mask": MASK[..., :7]},
    "mask.shape=(8, 8)": {"mask": MASK[0, 0]},
    "return_state needs causal=True": {"causal": False, "return_state": True},
    "initial_state needs causal=True": {"causal": False, "initial_state": STATE},
    "reverse needs causal=True": {"causal": False, "reverse": True},
    "chunk_size needs causal=True, log_decay or cu_seqlens": {"causal": False, "chunk_size": 64},
    "chunk_size=48 must be a power of two >= 16": {"chunk_size": 48},
    "initial_state.kv.shape=(1, 4, 16, 16) must be [N, H, D, Dv]=[2, 4, 16, 16]": {
        "initial_state": LinearAttentionState(STATE.kv[:1])
    },
    "initial_state.kv.dtype=bfloat16 must be float32": {
        "initial_state": LinearAttentionState(STATE.kv.astype(jnp.bfloat16))
    },
    "initial_state.z must be an array with normalize=True": {"initial_state": STATE, "normalize": True},
    "initial_state.z must be None with normalize=False": {
        "initial_state": LinearAttentionState(STATE.kv, STATE.kv[..., 0])
    },
    "initial_state must be a LinearAttentionState, got ArrayImpl": {"initial_state": STATE.kv},
    "batch=2 must be 1 with cu_seqlens": {"cu_seqlens": jnp.asarray([0, 8])},
    "normalize=1 must be True or False": {"initial_state": STATE, "normalize": 1},
    "scale=nan must be finite": {"scale": float("nan")},
    "implementation='cuda' must be None or one of": {"implementation": "cuda"},
}
BAD_PACKED = {
    "must start at 0": [1, 8],
    "never fall": [0, 5, 4],
    "end at 8 or before": [0, 9],
    "cu_seqlens.shape=(1,) must be [N + 1]": [0],
    "cu_seqlens.dtype=float32 must be an integer type": [0.0, 8.0],
}
BAD_QKV = {
    "heads of q, k, v, [4, 3, 3], must each divide": (X, X[:, :, :3], X[:, :, :3]),
    "head dims of q and k, 16 and 8, must be equal": (X, X[..., :8], X),
    "lengths of k and v, 8 and 7, must be equal": (X, X, X[:, :7]),
    "lengths of q and k, 8 and 7, must be equal with causal=True": (X, X[:, :7], X[:, :7]),
    "q, k, v batch sizes 2, 1, 1, must be equal": (X, ONE, ONE),
    "q.shape=(8, 4, 16) must have 4 axes: [batch, seq, heads, dim]": (X[0], X, X),
    "q.dtype=int32 must be one of": (X.astype(jnp.int32), X, X),
    "q, k, v dtypes float32, bfloat16, float32 must be equal": (X, X.astype(jnp.bfloat16), X),
}


def raises(message: str):
    import re

    kind = (ValueError, TypeError)
    return pytest.raises(kind, match=re.escape(message))


@pytest.mark.parametrize("message", BAD)
def test_option(message):
    with raises(message):
        linear_attention(X, X, X, **BAD[message])


@pytest.mark.parametrize("message", BAD_PACKED)
def test_cu_seqlens(message):
    with raises(message):
        linear_attention(ONE, ONE, ONE, cu_seqlens=jnp.asarray(BAD_PACKED[message]))


def test_cu_seqlens_without_a_sign():
    with raises("never fall"):
        linear_attention(ONE, ONE, ONE, cu_seqlens=jnp.asarray([0, 5, 4], jnp.uint32))


@pytest.mark.parametrize("message", BAD_QKV)
def test_inputs(message):
    with raises(message.replace(" 1, 1,", " 1, 1")):
        linear_attention(*BAD_QKV[message])


def test_state_of_another_number_of_sequences():
    with raises("initial_state.kv.shape=(2, 4, 16, 16) must be [N, H, D, Dv]=[3, 4, 16, 16]"):
        linear_attention(ONE, ONE, ONE, cu_seqlens=jnp.asarray([0, 1, 2, 8]), initial_state=STATE)


def test_decay_between_lengths():
    with raises("lengths of q and k, 8 and 7, must be equal with log_decay"):
        linear_attention(X, X[:, :7], X[:, :7], causal=False, log_decay=G)


def test_step():
    token = X[:, 0]
    with raises("log_decay.shape=(3,) must be [H]=[4] or [B, H]=[2, 4]"):
        linear_attention_step(token, token, token, STATE, log_decay=G[:3])
    with raises("log_decay max=1 must be <= 0"):
        linear_attention_step(token, token, token, STATE, log_decay=-G)
    with raises("log_decay.dtype=int32 must be floating point"):
        linear_attention_step(token, token, token, STATE, log_decay=jnp.zeros(4, jnp.int32))
    with raises("initial_state.kv.shape=(2, 4, 16, 16) must be"):
        linear_attention_step(token, token, token[..., :5], STATE)


def test_two_gates():
    with raises("g with g_gamma must be one or the other"):
        simple_gla(X, X, X, g=G, g_gamma=G)


@pytest.mark.parametrize("options", [{"cu_seqlens": np.array([0, 9])}, {"log_decay": np.array([-1.0, 1.0, 0, 0])}])
def test_values_that_a_jit_closes_over(options):
    with raises("end at 8 or before" if "cu_seqlens" in options else "log_decay max=1 must be <= 0"):
        jax.jit(lambda x: linear_attention(x, x, x, **options))(ONE)


@pytest.mark.parametrize(
    ("name", "bad", "wanted"),
    [
        ("dt", X[:, :, :1, 0], "(2, 8, 4)"),
        ("A", G[:1], "(4,)"),
        ("D", X[:1], "(4,) or (4, 16)"),
        ("z", X[:1], "(2, 8, 4, 16)"),
        ("dt_bias", G[0], "(4,)"),
    ],
)
def test_shapes_of_a_state_space_layer(name, bad, wanted):
    """None of them broadcasts."""
    with raises(f"{name}.shape={bad.shape} must be {wanted}, to go with x"):
        mamba2_ssd(**{"x": X, "dt": X[..., 0], "A": G, "B": X, "C": X, name: bad})


def test_traced_scale():
    with raises("scale must be known at trace time"):
        jax.jit(lambda s: linear_attention(X, X, X, scale=s))(1.0)

"""Calls of flash_attention as a Hopper GPU would see them, on shapes alone."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from jflash import backends, flash_attention, flash_attention_varlen
from pallas_kernels import _compat, hopper

MASKED = dict(
    deterministic=True,
    dropout_rate=0.1,
    dropout_key=jax.random.key(0),
    mask=(2, 1, 1, 2048),
    segment_ids=jnp.zeros((2, 2048), jnp.int32),
)
CALLS = {
    "D128": (dict(D=128), {}),
    "D128_causal": (dict(D=128), dict(causal=True)),
    "D128_window": (dict(D=128), dict(causal=True, window=(1024, None))),
    "D128_grouped": (dict(D=128, H=16, Hk=4), dict(causal=True)),
    "D128_ragged": (dict(D=128, S=1001), dict(causal=True)),
    "D128_sinks": (dict(D=128, sinks=True), dict(causal=True)),
    "D128_softcap": (dict(D=128), dict(causal=True, softcap=20.0)),
    "D128_alibi": (dict(D=128), dict(causal=True, alibi_slopes=jnp.ones(16))),
    "D128_segments": (dict(D=128), dict(causal=True, segment_ids=jnp.zeros((2, 2048), jnp.int32))),
    "D128_dropout": (dict(D=128), dict(causal=True, dropout_rate=0.1, dropout_key=jax.random.key(0))),
    "D128_mask": (dict(D=128), dict(causal=True, mask=(2, 1, 2048, 2048))),
    "D64_dropout": (dict(D=64), dict(dropout_rate=0.1, dropout_key=jax.random.key(0))),
    "D64_mask": (dict(D=64, S=1001), dict(mask=(1, 16, 1, 1001))),
    "D256_dropout": (dict(D=256), dict(dropout_rate=0.1, dropout_key=jax.random.key(0))),
    "D256_mask": (dict(D=256, S=1001), dict(mask=(2, 1, 1001, 1001))),
    "D128_deterministic_mask": (dict(D=128), MASKED),
    "D128_bias": (dict(D=128, bias=(1, 16, 2048, 2048)), dict(causal=True)),
    "D64_bias": (dict(D=64, S=1001, bias=(2, 16, 1001, 1001)), {}),
    "D128_deterministic_bias": (dict(D=128, bias=(2, 16, 2048, 2048)), dict(causal=True, deterministic=True)),
    "D64_deterministic_bias": (dict(D=64, bias=(2, 16, 1, 2048)), dict(deterministic=True)),
    "D192_bias_softcap": (dict(D=192, bias=(1, 1, 2048, 2048)), dict(causal=True, softcap=20.0)),
    "D256_bias": (dict(D=256, bias=(2, 1, 1, 2048)), {}),
    "D192_bias": (dict(D=192, Dv=128, bias=(1, 1, 2048, 2048)), dict(causal=True)),
    "D64_softcap": (dict(D=64), dict(softcap=20.0)),
    "D64_causal_softcap": (dict(D=64), dict(causal=True, softcap=20.0)),
    "D64_alibi": (dict(D=64, S=1001), dict(alibi_slopes=jnp.ones((2, 16)))),
    "D64_segments": (dict(D=64), dict(segment_ids=jnp.zeros((2, 2048), jnp.int32))),
    "D64": (dict(D=64), {}),
    "D64_causal": (dict(D=64), dict(causal=True)),
    "D64_ragged": (dict(D=64, S=1001), dict(window=(100, 100))),
    "D96": (dict(D=96), dict(causal=True)),
    "D80_Dv128": (dict(D=80, Dv=128), {}),
    "D192": (dict(D=192), dict(causal=True)),
    "D192_Dv128": (dict(D=192, Dv=128), dict(causal=True)),
    "D256": (dict(D=256), {}),
    "D256_causal": (dict(D=256), dict(causal=True)),
    "D256_ragged": (dict(D=256, S=1001), dict(causal=True)),
    "D256_softcap": (dict(D=256), dict(softcap=20.0)),
    "D256_packed": (dict(B=1, D=256, S=1001), dict(causal=True, sequences=3)),
    "D128_deterministic": (dict(D=128), dict(causal=True, deterministic=True)),
    "D256_deterministic_mask": (dict(D=256), MASKED),
    "D256_deterministic_bias": (dict(D=256, bias=(2, 16, 2048, 2048)), dict(deterministic=True)),
    "D64_deterministic": (dict(D=64, S=1001), dict(deterministic=True)),
    "D128_packed": (dict(B=1, D=128), dict(causal=True, sequences=4)),
    "D64_packed": (dict(B=1, D=64, S=1001), dict(window=(100, 0), sequences=3)),
    "D128_packed_alibi": (dict(B=1, D=128, S=1001), dict(softcap=20.0, sequences=3, alibi_slopes=jnp.ones((3, 16)))),
    "D64_packed_alibi": (dict(B=1, D=64), dict(causal=True, sequences=3, alibi_slopes=jnp.ones(16))),
    "D256_packed_alibi": (dict(B=1, D=256, S=1001), dict(causal=True, sequences=3, alibi_slopes=jnp.ones(16))),
    "float16": (dict(D=128, dtype=jnp.float16), dict(causal=True)),
}


# What the others show too.
SLOW = {"D128_mask", "D64_dropout", "D256_dropout", "D256_bias", "D192_bias", "D192_bias_softcap", "D64_bias"}
SLOW |= {"D64_packed_alibi", "D256_packed_alibi", "D256_deterministic_mask", "D128_deterministic_bias"}
SLOW |= {"D256_deterministic_bias", "D64_causal_softcap"}


def cases() -> list:
    """The names of the calls, for pytest."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CALLS]


def shapes(*, B=2, S=2048, H=16, Hk=None, D, Dv=None, sinks=False, bias=None, dtype=jnp.bfloat16):
    """q, k, v, what else is differentiable, and the cotangents of out and lse."""
    Hk, Dv = Hk or H, Dv or D
    array = jax.ShapeDtypeStruct
    q, k, v = array((B, S, H, D), dtype), array((B, S, Hk, D), dtype), array((B, S, Hk, Dv), dtype)
    cotangents = array((B, S, H, Dv), dtype), array((B, H, S), jnp.float32)
    more = {"sinks": array((H,), jnp.float32)} if sinks else {}
    if bias is not None:
        more["bias"] = array(bias, dtype)
    return (q, k, v), more, *cotangents


def forward_and_backward(options: dict):
    """out, lse and the gradients of q, k, v, bias and sinks, by the Hopper kernels. A mask is given by its shape."""

    def run(qkv, more, d_out, d_lse):
        arrays = {"mask": jnp.broadcast_to(d_lse[0, 0, 0] > 0, options["mask"])} if "mask" in options else {}

        def attend(qkv, more):
            call = packed if "sequences" in options else flash_attention
            return call(*qkv, **{**options, **arrays, **more}, return_lse=True, implementation="hopper")

        outputs, pull = jax.vjp(attend, qkv, more)
        return outputs, pull((d_out, d_lse))

    return run


def packed(q, k, v, *, sequences: int, **options):
    """flash_attention_varlen of a batch of one that holds some sequences."""
    lengths = jnp.linspace(0, q.shape[1], sequences + 1).astype(jnp.int32)
    out, lse = flash_attention_varlen(q[0], k[0], v[0], cu_seqlens_q=lengths, cu_seqlens_k=lengths, **options)
    return out[None], lse[None]


def on_hopper():
    """A context in which calls think they will run on one."""
    return mock.patch.object(backends, "target_of", return_value=hopper.TARGET)


def identity(x):
    """A kernel that does nothing, in the sense of JAX's text."""
    return _compat.kernel(
        lambda *refs: None,
        name="identity",
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch={},
        grid=(1,),
        grid_names=("cta",),
        warpgroups=1,
    )(x)

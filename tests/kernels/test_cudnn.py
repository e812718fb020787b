"""What jflash asks of cuDNN, without one: which calls, with which mask; and the numbers, with jax.nn in its place."""

import contextlib
import json
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

import jflash
from jflash import backends, flash_attention
from tests.oracle import assert_matches_oracle, inputs

SHAPE = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
CALLS = {"full": {}, "causal": {"causal": True}, "window": {"window": (20, 0)}}


@contextlib.contextmanager
def on(target: str):
    """Calls think they will run on that GPU."""
    jax.clear_caches()
    with mock.patch.object(backends, "target_of", return_value=target):
        yield
    jax.clear_caches()


def by_jax_nn(q, k, v, *, scale, mask_type, sliding_window_length, return_residual):
    """cuDNN's answer, computed by XLA."""
    left = sliding_window_length and sliding_window_length - 1
    options: dict[str, Any] = dict(
        scale=scale,
        is_causal=mask_type == fused.MaskType.CAUSAL,
        local_window_size=None if left is None else (left, 0),
        implementation="xla",
    )
    out = jax.nn.dot_product_attention(q, k, v, **options)
    _, lse = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)), **options, return_residual=True)
    return out, jnp.swapaxes(lse, 1, 2)


@pytest.mark.parametrize("name", CALLS)
def test_matches_oracle(name):
    """lse has a cotangent here, so the backward is that of xla, from these residuals."""
    with on("sm_80"), mock.patch.object(fused, "dot_product_attention", by_jax_nn):
        assert_matches_oracle(inputs(0, jnp.bfloat16, Sq=70, H=4, Hk=2, D=64), CALLS[name], "cudnn")


def test_gradients_are_those_of_the_forward():
    x = inputs(1, jnp.bfloat16, Sq=70, H=4, Hk=2, D=64)

    def gradients(implementation):
        def loss(x):
            return jnp.sum(jnp.sin(flash_attention(**x, causal=True, implementation=implementation).astype(float)))

        return jax.tree.map(lambda x: x.astype(float), jax.grad(loss)(x))

    with on("sm_80"), mock.patch.object(fused, "dot_product_attention", by_jax_nn):
        found, expected = gradients("cudnn"), gradients("reference")
    for name, grad in found.items():
        assert jnp.abs(grad - expected[name]).max() <= 0.01 * jnp.abs(expected[name]).max(), name


def custom_calls(differentiate_lse=False, shape=SHAPE, **options) -> list[tuple[str, dict]]:
    """The name and the settings of each custom call of a forward and backward on an A100."""

    def loss(q, k, v):
        out, lse = flash_attention(q, k, v, **options, return_lse=True, implementation="cudnn")
        return jnp.sum(out.astype(float)) + (jnp.sum(lse) if differentiate_lse else 0)

    checks = {"check_cudnn_version": 91900, "check_compute_capability": True, "is_cuda_compute_capability_equal": False}
    with contextlib.ExitStack() as stack:
        stack.enter_context(on("sm_80"))
        for name, answer in checks.items():
            stack.enter_context(mock.patch.object(fused, name, return_value=answer))
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(shape, shape, shape)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r'custom_call @(__cudnn\$\w+)\(.*?backend_config = "([^"]*)"', text)
    return [(name, json.loads(_plain(config))["cudnn_fmha_backend_config"]) for name, config in found]


def _plain(text: str) -> str:
    """MLIR writes a quote as \\22."""
    return re.sub(r"\\([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), text)


@pytest.mark.parametrize(
    ("name", "mask", "window"), [("full", "NO_MASK", 0), ("causal", "CAUSAL", 0), ("window", "CAUSAL", 21)]
)
def test_lowers_to_cudnn_s_own_mask(name, mask, window):
    calls = custom_calls(scale=0.25, **CALLS[name])
    assert {name for name, _ in calls} == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    for _, config in calls:
        assert config["fmha_scale"] == 0.25
        assert config["mask_type"] == mask
        assert config.get("sliding_window_length") == window


def test_odd_lengths_have_the_gradients_of_xla():
    calls = custom_calls(shape=jax.ShapeDtypeStruct((2, 127, 4, 64), jnp.bfloat16), causal=True)
    assert [name for name, _ in calls] == ["__cudnn$fmhaSoftmax"]


def test_a_gradient_through_lse_is_not_dropped():
    calls = custom_calls(differentiate_lse=True)
    assert [name for name, _ in calls] == ["__cudnn$fmhaSoftmax"]


REASONS = {
    "target=cpu must be an NVIDIA GPU, sm_80 or newer": {"target": "cpu"},
    "target=sm_75 must be an NVIDIA GPU, sm_80 or newer": {"target": "sm_75"},
    "head_dim=256 must be <= 128 and a multiple of 8": {"D": 256},
    "head_dim=60 must be <= 128 and a multiple of 8": {"D": 60},
    "head_dim=64 and value head_dim=32 must be equal": {"Dv": 32},
    "dtype=float32 must be bfloat16 or float16": {"dtype": jnp.float32},
    "window with right=3 must be 0, or both sides unbounded": {"window": (9, 3)},
    "window with left=9 needs right=0": {"window": (9, None)},
    "causal or window with Sq=128 and Sk=100 must be equal lengths": {"Sk": 100, "causal": True},
    "deterministic=True is not in cuDNN": {"deterministic": True},
    "softcap is not in cuDNN": {"softcap": 5.0},
    "bias is not in cuDNN": {"bias": jnp.zeros((128, 128))},
    "mask is not in cuDNN": {"mask": jnp.ones((128, 128), bool)},
    "segment_ids is not in cuDNN": {"segment_ids": jnp.zeros((2, 128), int)},
    "alibi_slopes is not in cuDNN": {"alibi_slopes": jnp.ones(4)},
    "sinks is not in cuDNN": {"sinks": jnp.ones(4)},
    "dropout_rate=0.1 is not in cuDNN": {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
}


def why_not(*, D=64, Dv=None, Sq=128, Sk=128, dtype=jnp.bfloat16, direction="backward", target="sm_80", **options):
    q, k, v = (jax.ShapeDtypeStruct((2, S, 4, d), dtype) for S, d in ((Sq, D), (Sk, D), (Sk, Dv or D)))
    return jflash.why_not(q, k, v, implementation="cudnn", direction=direction, target=target, **options)


@pytest.mark.parametrize("reason", REASONS)
def test_reasons(reason):
    assert why_not(**REASONS[reason]) == reason


def test_takes():
    assert why_not() is why_not(causal=True) is why_not(window=(9, 0)) is why_not(Sk=100) is None
    assert why_not(D=256, target="sm_120") is None
    assert why_not(Sq=99, Sk=101) is None


def test_other_gpus_use_it():
    assert "cudnn      forward   used" in jflash.explain(SHAPE, SHAPE, SHAPE, target="sm_80", causal=True)
    assert "hopper     forward   used" in jflash.explain(SHAPE, SHAPE, SHAPE, target="sm_90", causal=True)
    assert "xla        backward  used" in jflash.explain(SHAPE, SHAPE, SHAPE, target="sm_80", softcap=3.0)

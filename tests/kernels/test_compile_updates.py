"""Parts of what a kernel gave are set to zero, as by `out.at[...].set(0)` or in the gradient of one.

XLA would fuse a kernel with such an update, and then fail to compile what it made (JAX 0.11 and 0.12).
"""

import re

import jax
import jax.numpy as jnp
import pytest

from jflash import flash_attention, flash_attention_varlen, l1_attention, linear_attention
from tests.kernels.calls import on_hopper
from tests.kernels.h100 import compile_for_h100

pytestmark = pytest.mark.compile
ARRAY = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)


def dense(q, k, v):
    return flash_attention(q, k, v, causal=True, return_lse=True, implementation="hopper")


def packed(q, k, v):
    starts = jnp.array([0, 100, 200], jnp.int32)
    lengths = dict(cu_seqlens_q=starts, cu_seqlens_k=starts)
    return flash_attention_varlen(q[0], k[0], v[0], **lengths, implementation="hopper")


def linear(q, k, v):
    return linear_attention(q, k, v, implementation="hopper")


def l1(q, k, v):
    return l1_attention(q, k, v, implementation="hopper")


@pytest.mark.parametrize("attend", [dense, packed, linear, l1])
def test_results_and_gradients_can_be_updated(attend):
    def run(*qkv):
        results, pull = jax.vjp(attend, *qkv)
        return jax.tree.map(lambda x: x.at[1:].set(0), (results, pull(results)))

    with on_hopper():
        _, kernels = compile_for_h100(run, ARRAY, ARRAY, ARRAY)
    assert len(kernels) >= 2


def test_what_prevents_that_costs_no_copy():
    with on_hopper():
        compiled, _ = compile_for_h100(lambda *qkv: dense(*qkv)[0], ARRAY, ARRAY, ARRAY)
    operations = re.findall(r"= (?:\(.*?\)|\S+) ([a-z-]+)\(", str(compiled.as_text()))
    assert operations.count("custom-call") == 1
    assert set(operations) <= {"parameter", "constant", "custom-call", "tuple", "get-tuple-element"}

"""The Hopper kernels of L1 attention, forward and backward: interpreted, and compiled for an H100."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jflash.l1
from jflash import l1_attention
from jflash._l1_arguments import bind
from pallas_kernels import l1_tiles
from pallas_kernels.hopper import l1_backward, l1_forward
from pallas_kernels.parts import l1_gradients
from pallas_kernels.parts.swizzled_rows import RowsType
from tests.kernels import calls
from tests.kernels.calls import on_hopper
from tests.kernels.h100 import compile_for_h100
from tests.kernels.interpreted import interpreted
from tests.l1.rule import assert_same, inputs

OLD = jax.__version_info__ < (0, 11)
CASES = {
    "full": (dict(Sq=128, Sk=192, H=1, D=64), {}),
    "causal": (dict(Sq=150, Sk=130, H=1, D=40, Dv=24), dict(causal=True)),
    "grouped": (dict(B=2, Sq=70, Sk=100, H=2, Hk=1, D=20), dict(window=(40, 20), sink=jnp.array([0.3, -1.0]))),
    "reciprocal": (dict(Sq=100, H=1, D=64), dict(kind="reciprocal", eps=0.5)),
    "no_rows_see_keys": (dict(Sq=200, Sk=70, H=1, D=32), dict(causal=True)),
    "D128": (dict(Sq=100, H=1, D=128), {}),
    "segments": (dict(Sq=130, H=1, D=33, Dv=72), dict(segment_ids=jnp.repeat(jnp.arange(5), 26)[None])),
    "bfloat16": (dict(dtype=jnp.bfloat16, Sq=130, Sk=100, H=2, Hk=1, D=64), dict(causal=True)),
    "compute_f32": (dict(dtype=jnp.bfloat16, Sq=70, H=1, D=64), dict(compute="f32")),
    "float16": (dict(dtype=jnp.float16, Sq=70, H=1, D=128, Dv=64), {}),
    "odd": (
        dict(dtype=jnp.bfloat16, Sq=70, Sk=150, H=2, Hk=1, D=100, Dv=40),
        dict(sink=0.5, kind="reciprocal", eps=0.5),
    ),
}
QUICK = {"full", "causal", "grouped", "bfloat16"}


@pytest.mark.skipif(OLD, reason="takes minutes on this JAX")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_matches_oracle(name):
    shape, options = CASES[name]
    attend = functools.partial(l1_attention, **options, return_lse=True)
    with interpreted((l1_forward, "l1_forward"), (l1_backward, "l1_backward")):
        assert_same(
            lambda arrays: attend(**arrays, implementation="hopper"),
            lambda arrays: attend(**arrays, implementation="reference"),
            inputs(0, **shape),
        )


@pytest.mark.parametrize("head_dim", [16, 64, 72, 128])
def test_gradients_leave_no_column_out(head_dim):
    chunks = RowsType(1, 64, head_dim).chunks
    for columns in {tile.block for tile in (*l1_tiles.FLOAT32_BACKWARD.values(), *l1_tiles.BACKWARD.values())}:
        assert columns % l1_gradients.columns_at_once(columns, chunks) == 0


COMPILED = {
    "D64": (dict(D=64), {}),
    "D64_causal": (dict(D=64, Hk=2), dict(causal=True)),
    "D64_bfloat16": (dict(D=64, dtype=jnp.bfloat16), {}),
    "D64_float16_f32": (dict(D=64, S=333, dtype=jnp.float16), dict(compute="f32")),
    "D128": (dict(D=128), {}),
    "D72": (dict(D=72), {}),
    "D128_ragged": (dict(D=128, S=1001), dict(causal=True)),
    "D40_reciprocal": (dict(D=40, S=333), dict(kind="reciprocal")),
    "D128_bfloat16": (dict(D=128, dtype=jnp.bfloat16, S=1001), dict(causal=True)),
    "D128_float16": (dict(D=128, dtype=jnp.float16, S=1001), dict(causal=True)),
}


def forward_and_backward(options: dict):
    def run(qkv, d_out, d_lse):
        attend = functools.partial(l1_attention, **options, return_lse=True, implementation="hopper")
        outputs, pull = jax.vjp(attend, *qkv)
        return outputs, pull((d_out, d_lse))

    return run


def shapes(*, D: int, S=1024, Hk=None, dtype=jnp.float32):
    (q, k, v), _, d_out, d_lse = calls.shapes(B=1, S=S, H=4, Hk=Hk, D=D, dtype=dtype)
    return (q, k, v), d_out, d_lse


@pytest.mark.parametrize("name", COMPILED)
def test_lowers(name):
    shape, options = COMPILED[name]
    jax.clear_caches()
    with on_hopper():
        text = jax.jit(forward_and_backward(options)).trace(*shapes(**shape)).lower(lowering_platforms=("cuda",))
    assert text.as_text().count("custom_call @mosaic_gpu") == 3  # forward, dq, dk and dv


@pytest.mark.compile
@pytest.mark.parametrize("name", COMPILED)
def test_ptxas_has_no_complaint(name):
    shape, options = COMPILED[name]
    arrays = shapes(**shape)
    jax.clear_caches()
    with on_hopper():
        _, kernels = compile_for_h100(forward_and_backward(options), *arrays)
        p, _ = bind(*arrays[0], target="sm_90", **options)
        forward, backward = l1_tiles.forward_tile(p).spill_bytes, l1_tiles.backward_tile(p).spill_bytes
    limits = {"l1_forward": forward, "l1_backward_q": backward, "l1_backward_k": backward}
    assert {kernel.name for kernel in kernels} == limits.keys()
    for kernel in kernels:
        assert kernel.serialized is None, f"{kernel.name}: {kernel.serialized}"
        assert kernel.spill_bytes <= limits[kernel.name], f"{kernel.name} spills {kernel.spill_bytes} bytes"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(weight="exp"), "weight='exp'"),
        (dict(center=True), "center"),
        (dict(exclude_diagonal=True), "exclude_diagonal"),
        (dict(bias=jnp.ones((8, 8))), "bias"),
        (dict(mask=jnp.ones((8, 8), bool)), "mask"),
        (dict(scale=-1.0), "scale=-1.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_says_why_not(options, said):
    q = jnp.ones((1, 8, 1, 16))
    with on_hopper():
        assert said in jflash.l1.why_not(q, q, q, implementation="hopper", **options)
        assert jflash.l1.why_not(q, q, q, implementation="hopper") is None

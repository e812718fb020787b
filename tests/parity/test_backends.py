"""Which backend takes a call, what the others say, and that both are told in words."""

import re

import jax
import jax.numpy as jnp
import pytest

from jflash import explain, flash_attention, why_not

KEY = jax.random.key(0)
B, S, H = 2, 256, 4


def qkv(dtype=jnp.bfloat16, D=128, Dv=None, *, S=S):
    return [jax.ShapeDtypeStruct((B, S, H, n), dtype) for n in (D, D, Dv or D)]


def hopper(direction="forward", arrays=None, target="sm_90", **options):
    return why_not(*(arrays or qkv()), implementation="hopper", direction=direction, target=target, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (64, 0)}, {"scale": 0.2}], ids=str)
@pytest.mark.parametrize("arrays", [qkv(), qkv(D=64), qkv(jnp.float16), qkv(S=1000)], ids=["", "D64", "f16", "ragged"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_hopper_takes(direction, arrays, options):
    assert hopper(direction, arrays, **options) is None


REASONS = {
    "target=cpu must be sm_90, an NVIDIA Hopper GPU": {"target": "cpu"},
    "target=sm_80 must be sm_90, an NVIDIA Hopper GPU": {"target": "sm_80"},
    "target=sm_100 must be sm_90, an NVIDIA Hopper GPU": {"target": "sm_100"},
    "dtype=float32 must be bfloat16 or float16": {"arrays": qkv(jnp.float32)},
    "dtype=float64 must be bfloat16 or float16": {"arrays": qkv(jnp.float64)},
    "head_dim=256 must be <= 128": {"arrays": qkv(D=256)},
    "head_dim=64 and value head_dim=128 must pad to one multiple of 64": {"arrays": qkv(D=64, Dv=128)},
    "softcap=30.0 is not in the kernels": {"softcap": 30},
    "bias is not in the kernels": {"bias": jnp.ones((S, S))},
    "mask is not in the kernels": {"mask": jnp.ones((S, S), bool)},
    "segment_ids are not in the kernels": {"segment_ids": jnp.ones((B, S), int)},
    "alibi_slopes are not in the kernels": {"alibi_slopes": jnp.ones(H)},
    "dropout_rate=0.1 is not in the kernels": {"dropout_rate": 0.1, "dropout_key": KEY},
    "scale=-1.0 must be > 0": {"scale": -1},
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("reason", REASONS)
def test_hopper_says_why_not(reason, direction):
    assert hopper(direction, **REASONS[reason]) == reason


def test_a_backend_may_take_one_direction_alone():
    assert hopper("forward", deterministic=True) is None
    assert hopper("backward", deterministic=True) == "deterministic=True: dQ is summed in no fixed order"


@pytest.mark.parametrize("name", ["xla", "reference"])
@pytest.mark.parametrize("reason", REASONS)
def test_the_others_take_everything(name, reason):
    options = {"target": "sm_90", "arrays": qkv()} | REASONS[reason]
    arrays = options.pop("arrays")
    for direction in ("forward", "backward"):
        assert why_not(*arrays, implementation=name, direction=direction, **options) is None


CAN, USED = "can, but a faster backend is used", "used"


def table(hopper: tuple[str, str], xla: str) -> str:
    verdicts = {"hopper": hopper, "xla": (xla, xla), "reference": (CAN, CAN)}
    return "\n".join(
        f"{name:<10} {direction:<9} {verdict}"
        for name, pair in verdicts.items()
        for direction, verdict in zip(("forward", "backward"), pair, strict=True)
    )


def test_explain_where_hopper_is_used():
    assert explain(*qkv(), target="sm_90", causal=True) == table((USED, USED), CAN)


def test_explain_where_it_is_not():
    no = "no: softcap=30.0 is not in the kernels"
    assert explain(*qkv(), target="sm_90", softcap=30) == table((no, no), USED)


def test_an_unsupported_backward_rules_out_the_forward():
    no = "no: deterministic=True: dQ is summed in no fixed order"
    assert explain(*qkv(), target="sm_90", deterministic=True) == table(("can, but only forward", no), USED)


def test_explain_here():
    """Without a target it is where the arrays are; the options may be those of the call."""
    no = "no: target=cpu must be sm_90, an NVIDIA Hopper GPU"
    x = jnp.ones((B, S, H, 64))
    assert explain(x, x, x, return_lse=True) == table((no, no), USED)
    assert why_not(x, x, x, implementation="hopper", return_lse=True) == no.removeprefix("no: ")


def test_a_forced_backend_raises_its_reason():
    x = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError) as raised:
        flash_attention(x, x, x, implementation="hopper")
    assert str(raised.value) == (
        "implementation='hopper' cannot take this call: target=cpu must be sm_90, an NVIDIA Hopper GPU"
    )


def test_a_forced_backend_raises_under_jit_and_for_float64():
    with jax.enable_x64(True):
        x = jnp.ones((1, 8, 2, 64), jnp.float64)
        with pytest.raises(NotImplementedError, match="implementation='hopper' cannot take this call"):
            jax.jit(lambda x: flash_attention(x, x, x, implementation="hopper"))(x)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_forced_backend_runs(implementation):
    """Only the blocked path loops."""
    x = jnp.ones((1, 8, 2, 64))
    program = jax.make_jaxpr(lambda x: flash_attention(x, x, x, implementation=implementation))(x)
    assert ("scan" in str(program)) == (implementation == "xla")


def test_none_is_xla_here():
    x = jnp.ones((1, 8, 2, 64))
    assert "scan" in str(jax.make_jaxpr(lambda x: flash_attention(x, x, x))(x))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("implementation='cuda' must be None or one of 'hopper', 'xla', 'reference'", {"implementation": "cuda"}),
        ("direction='both' must be one of ('forward', 'backward')", {"direction": "both"}),
        ("softcap=-1.0 must be > 0, or None for no cap", {"softcap": -1}),
    ],
)
def test_bad_questions(message, options):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        why_not(*qkv(), **({"implementation": "xla"} | options))


def test_shapes_will_do():
    """Nothing but shapes: no array is made, of any argument."""
    shape = jax.ShapeDtypeStruct
    options = {
        "bias": shape((S, S), jnp.float32),
        "mask": shape((B, 1, 1, S), jnp.bool_),
        "segment_ids": shape((B, S), jnp.int32),
        "alibi_slopes": shape((H,), jnp.float32),
        "sinks": shape((B, H), jnp.bfloat16),
        "dropout_rate": 0.1,
        "dropout_key": jax.eval_shape(lambda: KEY),
    }
    assert why_not(*qkv(), implementation="xla", **options) is None
    assert "xla        backward  used" in explain(*qkv(), **options)

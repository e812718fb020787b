"""Which backend takes a call, what the others say, and that both are told in words."""

import re

import jax
import jax.numpy as jnp
import pytest

from jflash import backends, explain, flash_attention, why_not
from pallas_kernels.problem import AttentionProblem

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


WRONG = {
    "target=cpu must be sm_90, an NVIDIA Hopper GPU": {"target": "cpu"},
    "target=sm_80 must be sm_90, an NVIDIA Hopper GPU": {"target": "sm_80"},
    "target=sm_100 must be sm_90, an NVIDIA Hopper GPU": {"target": "sm_100"},
    "dtype=float32 must be bfloat16 or float16": {"arrays": qkv(jnp.float32)},
    "dtype=float64 must be bfloat16 or float16": {"arrays": qkv(jnp.float64)},
}
FEATURES = {
    "head_dim=256": {"arrays": qkv(D=256)},
    "head_dim=72": {"arrays": qkv(D=72)},
    "head_dim=64": {"arrays": qkv(D=128, Dv=64)},
    "softcap": {"softcap": 30},
    "bias": {"bias": jnp.ones((S, S))},
    "mask": {"mask": jnp.ones((S, S), bool)},
    "segment_ids": {"segment_ids": jnp.ones((B, S), int)},
    "alibi_slopes": {"alibi_slopes": jnp.ones(H)},
    "sinks": {"sinks": jnp.ones(H)},
    "dropout": {"dropout_rate": 0.1, "dropout_key": KEY},
    "scale": {"scale": -1},
    "deterministic": {"deterministic": True},
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("reason", WRONG)
def test_where_hopper_never_runs(reason, direction):
    assert hopper(direction, **WRONG[reason]) == reason


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", FEATURES)
def test_hopper_takes_a_feature_or_names_it(name, direction):
    """Whichever is true today; tests/gpu holds it to what it takes."""
    reason = hopper(direction, **FEATURES[name])
    assert reason is None or name in reason


@pytest.mark.parametrize("name", ["xla", "reference"])
@pytest.mark.parametrize("feature", [*WRONG, *FEATURES])
def test_the_others_take_everything(name, feature):
    options = {"target": "sm_90", "arrays": qkv()} | (WRONG | FEATURES)[feature]
    arrays = options.pop("arrays")
    for direction in ("forward", "backward"):
        assert why_not(*arrays, implementation=name, direction=direction, **options) is None


CAN, USED = "can, but a faster backend is used", "used"


def table(**verdicts: tuple[str, str]) -> str:
    return "\n".join(
        f"{name:<10} {direction:<9} {verdict}"
        for name, pair in verdicts.items()
        for direction, verdict in zip(("forward", "backward"), pair, strict=True)
    )


def backend(name, forward=None, backward=None):
    """One that cannot do a direction for the reason given."""
    reasons = {"forward": forward, "backward": backward}
    return backends.Backend(name, lambda problem, direction: reasons[direction], print, print)


@pytest.mark.parametrize(
    ("first", "chosen", "verdicts"),
    [
        (backend("first"), "first", (USED, USED)),
        (backend("first", "too wide", "too wide"), "second", ("no: too wide", "no: too wide")),
        (backend("first", forward="too wide"), "second", ("no: too wide", "can, but only backward")),
        (backend("first", backward="too wide"), "second", ("can, but only forward", "no: too wide")),
    ],
    ids=["both", "none", "backward", "forward"],
)
def test_the_first_that_can_do_both_directions_is_used(first, chosen, verdicts):
    """A missing backward rules out the forward too: it would surface in the middle of a training run."""
    among, problem = (first, backend("second")), AttentionProblem("cpu", "float32", 1, 1, 1, 8, 8, 8, 8, 1.0)
    assert backends.choose(problem, None, among) == chosen
    second = CAN if chosen == "first" else USED
    assert backends.explain(problem, among) == table(first=verdicts, second=(second, second))
    if chosen == "second":
        with pytest.raises(NotImplementedError, match=r"^implementation='first' cannot take this call: too wide$"):
            backends.choose(problem, "first", among)


def test_explain_where_hopper_is_used():
    found = explain(*qkv(), target="sm_90", causal=True)
    assert found == table(hopper=(USED, USED), cudnn=(CAN, CAN), xla=(CAN, CAN), reference=(CAN, CAN))


def test_explain_here():
    """Without a target it is where the arrays are; the options may be those of the call."""
    no, no_gpu = (
        "no: target=cpu must be sm_90, an NVIDIA Hopper GPU",
        "no: target=cpu must be an NVIDIA GPU, sm_80 or newer",
    )
    x = jnp.ones((B, S, H, 64))
    others = {"cudnn": (no_gpu, no_gpu), "xla": (USED, USED), "reference": (CAN, CAN)}
    assert explain(x, x, x, return_lse=True) == table(hopper=(no, no), **others)
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
        (
            "implementation='cuda' must be None or one of 'hopper', 'cudnn', 'xla', 'reference'",
            {"implementation": "cuda"},
        ),
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

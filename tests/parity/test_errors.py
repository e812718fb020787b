"""Every message for a bad argument, whole: it names the value and the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention

Q, K, V = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8)), jnp.ones((2, 5, 2, 6))
KEY = jax.random.key(0)

SHAPES = {
    "q.shape=(3, 4, 8) must have 4 axes: [batch, seq, heads, dim]": {"q": Q[0]},
    "k.shape=(1, 2, 5, 2, 8) must have 4 axes: [batch, seq, heads, dim]": {"k": K[None]},
    "v.shape=() must have 4 axes: [batch, seq, heads, dim]": {"v": jnp.float32(1)},
    "q, k, v batch sizes 1, 2, 2 must be equal": {"q": Q[:1]},
    "q, k, v batch sizes 2, 2, 1 must be equal": {"v": V[:1]},
    "k.shape=(2, 4, 2, 8) and v.shape=(2, 5, 2, 6) must agree in seq and heads": {"k": K[:, 1:]},
    "k.shape=(2, 5, 2, 8) and v.shape=(2, 5, 1, 6) must agree in seq and heads": {"v": V[:, :, :1]},
    "head dims of q and k, 7 and 8, must be equal": {"q": Q[..., 1:]},
    "head_dim=257 must be <= 256 and >= 1": {"q": jnp.ones((2, 3, 4, 257)), "k": jnp.ones((2, 5, 2, 257))},
    "head_dim=0 must be <= 256 and >= 1": {"q": Q[..., :0], "k": K[..., :0]},
    "value head_dim=300 must be <= 256 and >= 1": {"v": jnp.ones((2, 5, 2, 300))},
    "value head_dim=0 must be <= 256 and >= 1": {"v": V[..., :0]},
    "query heads=3 must be a multiple of key/value heads=2": {"q": Q[:, :, :3]},
    "query heads=1 must be a multiple of key/value heads=2": {"q": Q[:, :, :1]},
    "query heads=0 must be a multiple of key/value heads=2": {"q": Q[:, :, :0]},
    "query heads=4 must be a multiple of key/value heads=0": {"k": K[:, :, :0], "v": V[:, :, :0]},
    "bias.shape=(4, 3, 5) must have 4 axes [B, H, Sq, Sk], or 2 axes [Sq, Sk]": {"bias": jnp.ones((4, 3, 5))},
    "bias.shape=(2, 2, 3, 5) must broadcast to [B, H, Sq, Sk]=[2, 4, 3, 5]": {"bias": jnp.ones((2, 2, 3, 5))},
    "bias.shape=(1, 1, 5, 3) must broadcast to [B, H, Sq, Sk]=[2, 4, 3, 5]": {"bias": jnp.ones((5, 3))},
    "mask.shape=(5,) must have 4 axes [B, H, Sq, Sk], or 2 axes [Sq, Sk]": {"mask": jnp.ones(5, bool)},
    "mask.shape=(2, 1, 1, 4) must broadcast to [B, H, Sq, Sk]=[2, 4, 3, 5]": {"mask": jnp.ones((2, 1, 1, 4), bool)},
    "key segment_ids.shape=(2, 3) must be [B, S]=[2, 5]": {"segment_ids": jnp.ones((2, 3), int)},
    "query segment_ids.shape=(1, 3) must be [B, S]=[2, 3]": {
        "segment_ids": (jnp.ones((1, 3), int), jnp.ones((2, 5), int))
    },
    "alibi_slopes.shape=(2,) must be [H]=[4] or [B, H]=[2, 4]": {"alibi_slopes": jnp.ones(2)},
    "alibi_slopes.shape=(1, 4) must be [H]=[4] or [B, H]=[2, 4]": {"alibi_slopes": jnp.ones((1, 4))},
    "sinks.shape=() must be [H]=[4] or [B, H]=[2, 4]": {"sinks": jnp.float32(0)},
}
VALUES = {
    "scale=nan must be finite": {"scale": float("nan")},
    "scale=inf must be finite": {"scale": jnp.float32(jnp.inf)},
    "softcap=0.0 must be > 0, or None for no cap": {"softcap": 0.0},
    "softcap=-3.0 must be > 0, or None for no cap": {"softcap": -3},
    "softcap=nan must be finite": {"softcap": np.float32("nan")},
    "window left=-2 must be >= 0, or -1 or None for unbounded": {"window": (-2, 0)},
    "window right=-7 must be >= 0, or -1 or None for unbounded": {"window": (None, -7)},
    "dropout_rate=1.0 must be in [0, 1)": {"dropout_rate": 1, "dropout_key": KEY},
    "dropout_rate=-0.1 must be in [0, 1)": {"dropout_rate": -0.1, "dropout_key": KEY},
    "dropout_rate=nan must be finite": {"dropout_rate": float("nan"), "dropout_key": KEY},
    "dropout_rate=0.1 needs dropout_key": {"dropout_rate": 0.1},
    "implementation='cuda' must be None or one of 'hopper', 'cudnn', 'xla', 'reference'": {"implementation": "cuda"},
}
TYPES = {
    "q must be a jax or numpy array, got builtins.list": {"q": [[1.0]]},
    "k must be a jax or numpy array, got builtins.NoneType": {"k": None},
    "mask must be a jax or numpy array, got builtins.bool": {"mask": True},
    "q.dtype=int32 must be one of bfloat16, float16, float32, float64": {"q": Q.astype(jnp.int32)},
    "v.dtype=float8_e4m3fn must be one of bfloat16, float16, float32, float64": {"v": V.astype(jnp.float8_e4m3fn)},
    "q, k, v dtypes bfloat16, float32, float32 must be equal": {"q": Q.astype(jnp.bfloat16)},
    "q, k, v dtypes float32, float32, float16 must be equal": {"v": V.astype(jnp.float16)},
    "scale='1' must be a number": {"scale": "1"},
    "scale=True must be a number": {"scale": True},
    "scale=1j must be a number": {"scale": 1j},
    "softcap=[30] must be a number": {"softcap": [30]},
    "causal=1 must be True or False": {"causal": 1},
    "causal=None must be True or False": {"causal": None},
    "deterministic='yes' must be True or False": {"deterministic": "yes"},
    "return_lse='no' must be True or False": {"return_lse": "no"},
    "window=5 must be a pair (left, right)": {"window": 5},
    "window=(1, 2, 3) must be a pair (left, right)": {"window": (1, 2, 3)},
    "window left=1.0 must be an integer or None": {"window": (1.0, 0)},
    "window right=True must be an integer or None": {"window": (None, True)},
    "mask.dtype=float32 must be bool (True = visible); additive masks go to bias=": {"mask": jnp.ones((3, 5))},
    "bias.dtype=bool must be floating point; boolean masks go to mask=": {"bias": jnp.ones((3, 5), bool)},
    "bias.dtype=int32 must be floating point; boolean masks go to mask=": {"bias": jnp.ones((3, 5), int)},
    "segment_ids must be one array or a pair (query, key), got 3 arrays": {"segment_ids": [jnp.ones((2, 5), int)] * 3},
    "query segment_ids.dtype=float32 must be an integer type": {"segment_ids": jnp.ones((2, 5))},
    "key segment_ids must be a jax or numpy array, got builtins.NoneType": {
        "segment_ids": (jnp.ones((2, 3), int), None)
    },
    "alibi_slopes.dtype=int32 must be floating point": {"alibi_slopes": jnp.ones(4, int)},
    "sinks.dtype=bool must be floating point": {"sinks": jnp.ones(4, bool)},
}


def message_of(error, changes) -> str:
    with pytest.raises(error) as raised:
        flash_attention(**({"q": Q, "k": K, "v": V} | changes))
    assert type(raised.value) is error
    return str(raised.value)


@pytest.mark.parametrize("message", [*SHAPES, *VALUES])
def test_value(message):
    assert message_of(ValueError, (SHAPES | VALUES)[message]) == message


@pytest.mark.parametrize("message", TYPES)
def test_type(message):
    assert message_of(TypeError, TYPES[message]) == message


def test_the_call_itself_is_fine():
    """So that each error above comes from its one change."""
    assert flash_attention(Q, K, V).shape == (2, 3, 4, 6)


@pytest.mark.parametrize(
    ("name", "hint"), [("scale", "; to learn it, multiply q by it"), ("softcap", ""), ("dropout_rate", "")]
)
def test_numbers_are_known_at_trace_time(name, hint):
    with pytest.raises(TypeError, match=rf"^{name} must be known at trace time, got \S*float32\[\]{hint}(\n|$)"):
        jax.jit(lambda x: flash_attention(Q, K, V, **{name: x}))(0.5)


def test_torch_tensors_are_sent_to_interop():
    torch = pytest.importorskip("torch")
    assert message_of(TypeError, {"q": torch.ones(2, 3, 4, 8)}) == (
        "q must be a jax or numpy array, got torch.Tensor; for torch tensors use the functions of `interop`"
    )


@pytest.mark.parametrize("key", [3, jnp.ones(3, jnp.uint32), jax.random.split(KEY, 2)], ids=["int", "shape", "many"])
def test_dropout_key_is_one_key(key):
    """JAX says so itself."""
    with pytest.raises((TypeError, ValueError), match="key"):
        flash_attention(Q, K, V, dropout_rate=0.1, dropout_key=key)


def test_arguments_after_v_have_names():
    with pytest.raises(TypeError, match="positional"):
        flash_attention(Q, K, V, 0.5)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_causal'"):
        flash_attention(Q, K, V, is_causal=True)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    "options",
    [
        {"scale": np.float32(0.5)},
        {"scale": np.array(0.5)},
        {"scale": jnp.float32(0.5)},
        {"scale": 1},
        {"window": [np.int64(3), -1]},
        {"causal": np.True_},
        {"bias": np.zeros((3, 5), np.float16)},
        {"segment_ids": [np.zeros((2, 3), np.uint8), np.zeros((2, 5), np.int64)]},
        {"sinks": np.zeros((2, 4))},
        {"dropout_rate": 0.1, "dropout_key": jax.random.PRNGKey(0)},
        {"q": np.ones((2, 3, 4, 8), np.float32)},
    ],
    ids=str,
)
def test_what_numpy_and_jax_call_a_number_or_an_array_is_one(options):
    out = jax.eval_shape(lambda: flash_attention(**({"q": Q, "k": K, "v": V} | options)))
    assert (out.shape, out.dtype) == ((2, 3, 4, 6), jnp.float32)

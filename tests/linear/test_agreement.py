"""The forms of linear attention are one function: recurrent, chunked, quadratic, split, and other people's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import (
    LinearAttentionState,
    lightning_attention,
    linear_attention,
    linear_attention_step,
    mamba2_ssd,
    retention,
    simple_gla,
)
from jflash.linear_variants import alibi_slopes, lightning_log_decay, retention_log_decay
from tests.linear.rule import DECAYS, inputs


def close(x, y, tolerance=2e-5):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, np.abs(y).max()))


def steps(arrays: dict, **options):
    """`linear_attention_step` over the tokens of causal arrays."""
    g = arrays.get("log_decay")
    at = lambda t: {} if g is None else {"log_decay": g if g.ndim == 1 else g[:, t]}  # noqa: E731

    def step(state, t):
        q, k, v = (arrays[name][:, t] for name in "qkv")
        out, state = linear_attention_step(q, k, v, state, **at(t), **options)
        return state, out

    state, out = jax.lax.scan(step, arrays["initial_state"], jnp.arange(arrays["q"].shape[1]))
    return jnp.moveaxis(out, 0, 1), state


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_recurrent_is_chunked_is_quadratic(decay, normalize):
    arrays = inputs(decay=decay, state=True, positive=normalize, Hq=2, Hk=2, Hv=4, Dv=5)
    recurrent = steps(arrays, normalize=normalize)
    for form in ({"implementation": "xla", "chunk_size": 16}, {"implementation": "reference"}):
        found = linear_attention(**arrays, normalize=normalize, return_state=True, **form)
        jax.tree.map(close, found, recurrent)


def test_recurrence_by_hand():
    """The definition in a loop of numpy, with nothing of ours in it."""
    arrays = inputs(B=1, S=40, Hq=1, decay="token", state=True)
    q, k, v = (np.asarray(arrays[name], np.float64)[0, :, 0] for name in "qkv")
    g = np.asarray(arrays["log_decay"], np.float64)[0, :, 0]
    state, outs = np.asarray(arrays["initial_state"].kv, np.float64)[0, 0], []
    for t in range(len(q)):
        state = np.exp(g[t]) * state + np.outer(k[t], v[t])
        outs.append(0.5 * q[t] @ state)
    out, final = linear_attention(**arrays, scale=0.5, return_state=True, chunk_size=16)
    close(out[0, :, 0], np.stack(outs))
    close(final.kv[0, 0], state)


@pytest.mark.parametrize("split", [16, 49])
def test_two_calls_are_one(split):
    """[0:t] and then [t:S] from its state, with the gradients of everything."""
    arrays = inputs(decay="token", state=True)
    times = ("q", "k", "v", "log_decay")

    def whole(arrays):
        return linear_attention(**arrays, return_state=True, chunk_size=16)

    def halves(arrays):
        first = {name: arrays[name][:, :split] for name in times}
        second = {name: arrays[name][:, split:] for name in times}
        a, state = linear_attention(**first, initial_state=arrays["initial_state"], return_state=True, chunk_size=16)
        b, state = linear_attention(**second, initial_state=state, return_state=True, chunk_size=16)
        return jnp.concatenate([a, b], axis=1), state

    cotangent = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), whole(arrays))
    results = [jax.jit(lambda a, f=f: (f(a), jax.vjp(f, a)[1](cotangent)))(arrays) for f in (whole, halves)]
    jax.tree.map(close, *results)


def test_reverse_is_causal_on_flipped_tokens():
    arrays = inputs(decay="token", state=True)
    flipped = {name: x if name == "initial_state" else jnp.flip(x, axis=1) for name, x in arrays.items()}
    out, state = linear_attention(**arrays, reverse=True, return_state=True, chunk_size=16)
    out2, state2 = linear_attention(**flipped, return_state=True, chunk_size=16)
    close(out, jnp.flip(out2, axis=1))
    close(state.kv, state2.kv)


def test_both_sides_is_the_sum_with_one_diagonal():
    arrays = inputs(decay="token")
    diagonal = (arrays["q"] * arrays["k"]).sum(-1, keepdims=True) * arrays["v"] * 8**-0.5
    one_way, other_way = (linear_attention(**arrays, reverse=reverse, chunk_size=16) for reverse in (False, True))
    close(linear_attention(**arrays, causal=False, chunk_size=16), one_way + other_way - diagonal)


def test_decay_is_a_mask():
    arrays = inputs(decay="head", B=1)
    i, j = jnp.arange(50)[:, None], jnp.arange(50)
    mask = jnp.where(i >= j, jnp.exp((i - j) * arrays["log_decay"][:, None, None]), 0)[None]
    out = linear_attention(**arrays, chunk_size=16)
    close(linear_attention(arrays["q"], arrays["k"], arrays["v"], mask=mask), out)


@pytest.mark.parametrize("decay", DECAYS)
def test_rms_error_in_bfloat16(decay):
    """The test of flash-linear-attention: rms error below 0.005 of the rms of the exact result."""
    arrays = inputs(dtype=jnp.bfloat16, S=300, D=64, decay=decay, strength=0.1, B=1)
    exact = linear_attention(**{n: x.astype(jnp.float32) for n, x in arrays.items()}, implementation="reference")
    error = linear_attention(**arrays, implementation="xla").astype(jnp.float32) - exact
    assert jnp.sqrt(jnp.mean(error**2) / jnp.mean(exact**2)) < 0.005


def test_variants_are_decays():
    arrays = inputs(Hq=4)
    q, k, v = arrays.values()
    g = -jnp.abs(jax.random.normal(jax.random.key(1), (2, 50, 4)))
    close(simple_gla(q, k, v, g=g), linear_attention(q, k, v, log_decay=g))
    close(simple_gla(q, k, v, g_gamma=g[0, 0]), linear_attention(q, k, v, log_decay=g[0, 0]))
    close(simple_gla(q, k, v), linear_attention(q, k, v))
    close(retention(q, k, v), linear_attention(q, k, v, log_decay=jnp.log(1 - 2.0 ** (-5 - jnp.arange(4)))))
    assert retention_log_decay(2).tolist() == pytest.approx([np.log(31 / 32), np.log(63 / 64)])


def test_decays_of_the_two_lightning_conventions():
    assert alibi_slopes(8).tolist() == pytest.approx([2.0 ** -(h + 1) for h in range(8)])
    assert alibi_slopes(3).tolist() == pytest.approx([2**-4, 2**-8, 2**-2])
    assert lightning_log_decay(8, 0, 5).tolist() == pytest.approx([-(2.0 ** -(h + 1)) * 1.00001 for h in range(8)])
    assert lightning_log_decay(8, 4, 5).tolist() == pytest.approx([-(2.0 ** -(h + 1)) * 1e-5 for h in range(8)])
    assert lightning_log_decay(4, 1, 4, "transnormer_paper").tolist() == pytest.approx([0, -1.5, -3, -4.5])
    with pytest.raises(ValueError, match="convention='paper'"):
        lightning_log_decay(4, 0, 4, "paper")
    with pytest.raises(ValueError, match="layer_idx=4 must be >= 0 and < num_layers=4"):
        lightning_log_decay(4, 4, 4)


def test_lightning_attention_of_transformers():
    """MiniMax's layer, with its projections on either side of ours."""
    torch = pytest.importorskip("torch")
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    H, D, layers = 4, 8, 3
    config = minimax.MiniMaxConfig(
        hidden_size=32, num_attention_heads=H, head_dim=D, num_hidden_layers=layers, block_size=16,
        layer_types=["linear_attention"] * layers,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = minimax.MiniMaxLightningAttention(config, layer_idx=1)
    x = torch.randn(2, 50, 32)
    with torch.no_grad():
        theirs, their_state = layer(x, None, None)
        qkv = layer.act_fn(layer.qkv_proj(x)).reshape(2, 50, H, 3 * D).numpy()
        q, k, v = np.split(qkv, 3, axis=-1)
        out, state = lightning_attention(q, k, v, layer_idx=1, num_layers=layers, return_state=True)
        out = layer.norm(torch.tensor(np.asarray(out)).reshape(2, 50, H * D))
        ours = layer.out_proj(torch.sigmoid(layer.output_gate(x)) * out)
    close(ours, theirs, 1e-4)
    close(state.kv, their_state, 1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_of_transformers(groups):
    torch = pytest.importorskip("torch")
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    H, P, N = 4, 6, 8
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    x, dt, A = normal(2, 50, H, P), normal(2, 50, H), -np.abs(normal(H))
    B, C, D, bias = normal(2, 50, groups, N), normal(2, 50, groups, N), normal(H), normal(H)
    start = normal(2, H, P, N)
    tensors = [torch.tensor(a) for a in (x, dt, A, B, C)]
    theirs, their_state = mamba2.mamba2_chunk_scan(
        *tensors, chunk_size=16, D=torch.tensor(D), dt_bias=torch.tensor(bias), dt_softplus=True,
        initial_states=torch.tensor(start), return_final_states=True,
    )  # fmt: skip
    state = LinearAttentionState(jnp.asarray(start.swapaxes(2, 3)))
    options = {"D": D, "dt_bias": bias, "dt_softplus": True, "initial_state": state, "return_state": True}
    ours, state = mamba2_ssd(*map(jnp.asarray, (x, dt, A, B, C)), **options)
    close(ours, theirs.numpy())
    close(state.kv, their_state.swapaxes(2, 3).numpy())
    z = jnp.asarray(normal(2, 50, H, P))
    gated, _ = mamba2_ssd(*map(jnp.asarray, (x, dt, A, B, C)), z=z, **options)
    close(gated, ours * jax.nn.silu(z))

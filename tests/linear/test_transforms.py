"""jit, vmap over every argument, checkpoint, scan, second derivatives, and calls over nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import linear, linear_attention, linear_attention_step
from tests.linear.rule import everything, inputs

CAUSAL = [inputs(seed, decay="token", state=True, S=20, B=2) for seed in range(3)]
MASKED = [inputs(seed, mask=(1, 2, 20, 20), S=20, B=2) for seed in range(3)]
PER_HEAD = [inputs(seed, decay="head", S=20, B=1) | {"cu_seqlens": jnp.asarray((0, 3 + seed, 20))} for seed in range(3)]


def results_and_gradients(attend, arrays: dict):
    """Every result, and the gradients of a sum of it, so that vmap meets the backward too."""
    fixed = {name: x for name, x in arrays.items() if name == "cu_seqlens"}

    def loss(moving):
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(attend(**moving, **fixed)))

    moving = {name: x for name, x in arrays.items() if name not in fixed}
    return attend(**arrays), jax.grad(loss)(moving)


def check_vmap(examples: list[dict], mapped: tuple[str, ...], **options):
    def attend(**arrays):
        return linear_attention(**arrays, implementation="xla", **options)

    run = lambda arrays: results_and_gradients(attend, arrays)  # noqa: E731
    chosen = [{name: (x if name in mapped else examples[0][name]) for name, x in e.items()} for e in examples]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *map(jax.jit(run), chosen))
    stacked = {
        name: jax.tree.map(lambda *xs: jnp.stack(xs), *(e[name] for e in examples)) if name in mapped else x
        for name, x in examples[0].items()
    }
    axes = ({name: 0 if name in mapped else None for name in stacked},)
    found = jax.jit(jax.vmap(run, in_axes=axes))(stacked)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), found, expected)


@pytest.mark.parametrize("mapped", [("log_decay",), ("q", "initial_state")], ids=str)
def test_vmap_causal(mapped):
    check_vmap(CAUSAL, mapped, chunk_size=16)


@pytest.mark.parametrize("mapped", [("mask",), ("q", "k", "v")], ids=str)
def test_vmap_masked(mapped):
    check_vmap(MASKED, mapped)


@pytest.mark.parametrize("mapped", [("log_decay",), ("q", "k", "v", "cu_seqlens")])
def test_vmap_packed(mapped):
    check_vmap(PER_HEAD, mapped, chunk_size=16)


def test_vmap_over_nothing():
    arrays = CAUSAL[0]
    none = jnp.zeros((0, *arrays["q"].shape))
    out = jax.vmap(lambda q: linear_attention(q, arrays["k"], arrays["v"], implementation="xla"))(none)
    assert out.shape == none.shape


def test_checkpoint_and_scan():
    arrays = CAUSAL[0]
    k, v, g = (arrays[name] for name in ("k", "v", "log_decay"))
    layer = lambda x: linear_attention(x, k, v, log_decay=g, implementation="xla", chunk_size=16)  # noqa: E731
    unrolled = jax.grad(lambda x: layer(layer(x)).sum())(arrays["q"])
    scanned = lambda x: jax.lax.scan(lambda x, _: (jax.checkpoint(layer)(x), None), x, length=2)[0].sum()  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(arrays["q"]), unrolled, rtol=1e-4, atol=1e-4)


def test_second_derivatives_by_the_reference_or_an_error():
    q, k, v = (CAUSAL[0][name][:1, :5] for name in "qkv")
    inner = lambda q, name: jax.grad(lambda q: (linear_attention(q, k, v, implementation=name) ** 2).sum())(q).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="implementation='reference'"):
        jax.grad(inner)(q, "xla")
    assert jnp.isfinite(jax.grad(inner)(q, "reference")).all()


def test_step_is_differentiable():
    arrays = inputs(S=1, decay="token", state=True)

    def by_step(a):
        q, k, v, g = (a[name][:, 0] for name in ("q", "k", "v", "log_decay"))
        out, state = linear_attention_step(q, k, v, a["initial_state"], log_decay=g)
        return jnp.sin(out).sum() + jnp.sin(state.kv).sum()

    def by_call(a):
        out, state = linear_attention(**a, return_state=True, implementation="reference")
        return jnp.sin(out).sum() + jnp.sin(state.kv).sum()

    compare = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(compare, jax.grad(by_step)(arrays), jax.grad(by_call)(arrays))


@pytest.mark.parametrize("shape", [{"B": 0}, {"S": 0}, {"B": 0, "S": 0}], ids=str)
def test_nothing_comes_back(shape):
    arrays = inputs(decay="token", state=True, **shape)
    found = everything(linear_attention, arrays, implementation="xla")
    assert found["out"].shape == arrays["q"].shape
    np.testing.assert_array_equal(found["kv"], arrays["initial_state"].kv)


def test_no_keys_is_zero():
    q, none = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 0, 2, 8))
    assert not linear_attention(q, none, none, causal=False).any()
    assert not linear_attention(q, none, none, mask=jnp.ones((1, 1, 4, 0))).any()


def test_explain_and_why_not():
    q = jnp.ones((1, 8, 2, 16))
    assert "xla        forward   used" in linear.explain(q, q, q, log_decay=-jnp.ones(2))
    assert linear.why_not(q, q, q, implementation="xla", direction="backward") is None
    with pytest.raises(ValueError, match="implementation='cuda' must be None or one of"):
        linear_attention(q, q, q, implementation="cuda")

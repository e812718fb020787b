"""Both ways at once: P vf + P^T vb with one P, which only the test ever writes down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import l1_attention, l1_attention_bidi, l1_scores
from tests.l1.rule import assert_same, inputs, normal, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("small_tiles")

B, S, H = 2, 64, 4
CASES = {
    "reciprocal": dict(kind="reciprocal", eps=0.05, scale=0.2, sink=0.5),
    "window": dict(window=(9, 4), exclude_diagonal=True),
    "mask": dict(mask=jnp.asarray(np.random.default_rng(0).uniform(size=(B, 1, S, S)) < 0.6)),
    "segments": dict(segment_ids=jnp.arange(S)[None].repeat(B, 0) // 12),
    "exp": dict(weight="exp", causal=True),
    "tanh1": dict(weight="tanh1", center=True),
}


def arrays(seed=0, dtype=jnp.float32, **sizes):
    found = inputs(seed, dtype, **{**dict(B=B, Sq=S, H=H, Hk=2, Dv=12), **sizes})
    found["vf"] = found.pop("v")
    return found | {"vb": normal(seed + 9, *found["vf"].shape, dtype=dtype)}


def weights(q, k, **options):
    """P [B, H, S, S], read off by values that pick one key each."""
    one_hot = jnp.broadcast_to(jnp.eye(S, dtype=q.dtype)[None, :, None], (B, S, 2, S))
    return jnp.moveaxis(l1_attention(q, k, one_hot, **options, implementation="reference"), 1, 2)


def plain(arrays, **options):
    p = weights(arrays["q"], arrays["k"], **options).astype(jnp.promote_types(arrays["q"].dtype, jnp.float32))
    vf, vb = (jnp.repeat(arrays[name], 2, axis=2).astype(p.dtype) for name in ("vf", "vb"))
    out = jnp.einsum("bhts,bshw->bthw", p, vf) + jnp.einsum("bhts,bthw->bshw", p, vb)
    return out.astype(arrays["q"].dtype)


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case):
    options = CASES[case]
    assert_same(lambda a: l1_attention_bidi(**a, **options), lambda a: plain(a, **options), arrays())


def test_bias_and_sink_are_differentiable():
    more = {"bias": normal(20, 1, H, S, 1), "sink": normal(21, H)}
    assert_same(
        lambda a: l1_attention_bidi(**a),
        lambda a: plain({name: a[name] for name in ("q", "k", "vf", "vb")}, bias=a["bias"], sink=a["sink"]),
        arrays() | more,
    )


def test_bfloat16():
    assert_same(lambda a: l1_attention_bidi(**a), plain, arrays(3, jnp.bfloat16))


def test_packed_with_anything_behind():
    cu = jnp.asarray([0, 20, 33])
    found = arrays(4)
    found = {name: x[:1] for name, x in found.items()}
    poisoned = {name: x.at[:, 33:].set(jnp.nan) for name, x in found.items()}
    x = outputs_and_gradients(lambda a: l1_attention_bidi(**a, cu_seqlens=cu), poisoned)
    y = [l1_attention_bidi(*(found[name][:, a:b] for name in ("q", "k", "vf", "vb"))) for a, b in ((0, 20), (20, 33))]
    np.testing.assert_allclose(
        x["out"], jnp.pad(jnp.concatenate(y, 1), ((0, 0), (0, S - 33), (0, 0), (0, 0))), atol=1e-5
    )
    assert all(np.isfinite(gradient).all() for gradient in x["d"].values())


def test_scores_agree_with_the_weights():
    q, k, _, _ = arrays(5).values()
    expected = jax.nn.softmax(l1_scores(q, k), axis=-1)
    np.testing.assert_allclose(weights(q, k), expected, atol=1e-6)


def test_memory_is_linear():
    """No S x S array, though the backward direction needs every weight transposed."""
    S, H = 8192, 4
    x = jax.ShapeDtypeStruct((1, S, H, 64), jnp.float32)
    run = jax.jit(jax.grad(lambda *a: l1_attention_bidi(*a).sum(), argnums=(0, 1, 2, 3)))
    assert run.lower(x, x, x, x).compile().memory_analysis().temp_size_in_bytes < H * S * S * 4 / 8


def test_errors():
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match=r"query length=4 must equal key length=3 to go both ways"):
        l1_attention_bidi(q, q[:, :3], q[:, :3], q[:, :3])
    with pytest.raises(ValueError, match=r"vb float32\[1, 4, 2, 4\] must be float32\[1, 4, 2, 8\]"):
        l1_attention_bidi(q, q, q, q[..., :4])
    with pytest.raises(ValueError, match="vb bfloat16"):
        l1_attention_bidi(q, q, q, q.astype(jnp.bfloat16))

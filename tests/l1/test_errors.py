"""Bad input: every error names the value and the rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jflash
from jflash import l1_attention, l1_scores

Q = jnp.ones((2, 5, 4, 8))
K = jnp.ones((2, 6, 2, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="l3"), r"kind='l3' must be one of 'neg', 'reciprocal'"),
        (dict(weight="relu"), r"weight='relu' must be one of 'softmax', 'exp', 'tanh1'"),
        (dict(compute="u8"), r"compute='u8' must be one of 'auto', 'f32'"),
        (dict(kind="reciprocal", eps=0), r"eps=0.0 must be > 0 with kind='reciprocal'"),
        (dict(kind="reciprocal", eps=-1e-3), r"eps=-0.001 must be > 0 with kind='reciprocal'"),
        (dict(kind="reciprocal", scale=-1.0), r"scale=-1.0 must be >= 0 with kind='reciprocal'"),
        (dict(kind="reciprocal", center=True), r"center=True needs kind='neg'"),
        (dict(eps=float("nan")), r"eps=nan must be finite"),
        (dict(scale=float("inf")), r"scale=inf must be finite"),
        (dict(sink=float("inf")), r"sink=inf must be finite"),
        (dict(sink=0.0, weight="exp"), r"sink=0.0 needs weight='softmax': weight='exp' has no denominator"),
        (dict(sink=jnp.zeros(3)), r"sinks.shape=\(3,\) must be \[H\]=\[4\] or \[B, H\]=\[2, 4\]"),
        (dict(return_lse=True, weight="tanh1"), r"return_lse needs weight='softmax': weight='tanh1' has"),
        (dict(window=(-2, 0)), r"window left=-2 must be >= 0"),
        (dict(mask=jnp.ones((3, 1, 1, 6), bool)), r"mask.shape=\(3, 1, 1, 6\) must broadcast to \[B, H, Sq, Sk\]"),
        (dict(cu_seqlens=jnp.asarray([0, 5])), r"cu_seqlens needs batch=1, sequences packed in one row, got batch=2"),
        (dict(implementation="cuda"), r"implementation='cuda' must be None or one of 'hopper', 'xla', 'reference'"),
    ],
    ids=lambda x: "" if isinstance(x, str) else str(x)[:40],
)
def test_values(options, message):
    with pytest.raises(ValueError, match=message):
        l1_attention(Q, K, K, **options)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (Q[..., :7], K, K, r"head dims of q and k, 7 and 8, must be equal"),
        (Q[:, :, :3], K, K, r"query heads=3 must be a multiple of key/value heads=2"),
        (Q, K, K[:, :5], r"k.shape=\(2, 6, 2, 8\) and v.shape=\(2, 5, 2, 8\) must agree"),
        (Q[0], K, K, r"q.shape=\(5, 4, 8\) must have 4 axes"),
        (jnp.ones((2, 5, 4, 300)), jnp.ones((2, 6, 2, 300)), K, r"head_dim=300 must be <= 256"),
    ],
)
def test_shapes(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        l1_attention(q, k, v)


@pytest.mark.parametrize(
    ("cu_seqlens", "options", "message"),
    [
        ([1, 5], {}, r"cu_seqlens=\[1, 5\] must ascend from 0 to at most 5 tokens"),
        ([0, 4, 3], {}, r"cu_seqlens=\[0, 4, 3\] must ascend"),
        (np.array([0, 4, 3], np.uint8), {}, r"cu_seqlens=\[0, 4, 3\] must ascend"),
        ([0, 6], {}, r"cu_seqlens=\[0, 6\] must ascend from 0 to at most 5 tokens"),
        ([0], {}, r"cu_seqlens int32\[1\] must be integers \[sequences \+ 1\]"),
        ([0.0, 5.0], {}, r"cu_seqlens float32\[2\] must be integers"),
        ([0, 5], {"segment_ids": jnp.zeros((1, 5), int)}, r"cu_seqlens and segment_ids both say"),
    ],
)
def test_cu_seqlens(cu_seqlens, options, message):
    x = jnp.ones((1, 5, 2, 8))
    with pytest.raises(ValueError, match=message):
        l1_attention(x, x, x, cu_seqlens=jnp.asarray(cu_seqlens), **options)


def test_cu_seqlens_in_pairs():
    x, y = jnp.ones((1, 5, 2, 8)), jnp.ones((1, 6, 2, 8))
    pair = jnp.asarray([0, 5]), jnp.asarray([0, 2, 6])
    with pytest.raises(ValueError, match=r"cu_seqlens of queries and keys, \(2,\) and \(3,\), must be equally long"):
        l1_attention(x, y, y, cu_seqlens=pair)
    with pytest.raises(ValueError, match="causal, window and exclude_diagonal need one cu_seqlens"):
        l1_attention(x, y, y, cu_seqlens=pair, causal=True)
    with pytest.raises(TypeError, match="one array or a pair"):
        l1_attention(x, y, y, cu_seqlens=(*pair, pair[0]))


def test_types():
    with pytest.raises(TypeError, match=r"scale must be known at trace time"):
        jax.jit(lambda scale: l1_attention(Q, K, K, scale=scale))(0.5)
    with pytest.raises(TypeError, match=r"q, k, v dtypes float32, bfloat16, float32 must be equal"):
        l1_attention(Q, K.astype(jnp.bfloat16), K)
    with pytest.raises(TypeError, match=r"q.dtype=int32 must be one of"):
        l1_attention(Q.astype(int), K.astype(int), K.astype(int))
    with pytest.raises(TypeError, match="unexpected keyword argument 'softcap'"):
        l1_attention(Q, K, K, softcap=3.0)


def test_scores():
    with pytest.raises(ValueError, match=r"layout='bths' must be one of 'bhts', 'bsth', 'bhst'"):
        l1_scores(Q, K, layout="bths")
    with pytest.raises(ValueError, match=r"kind='exp' must be one of"):
        l1_scores(Q, K, kind="exp")
    with pytest.raises(ValueError, match=r"head dims of q and k, 8 and 7, must be equal"):
        l1_scores(Q, K[..., :7])


def test_explain():
    q, k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (Q, K))
    text = jflash.l1.explain(q, k, k, causal=True, kind="reciprocal", target="sm_90", return_lse=True)
    assert "hopper     backward  used" in text
    text = jflash.l1.explain(q, k, k, center=True, target="sm_90")
    assert "hopper     forward   no: center is not in the kernels" in text
    assert "xla        forward   used" in text
    assert "reference  backward  can, but a faster backend is used" in text
    assert jflash.l1.why_not(q, k, k, implementation="xla", direction="backward", return_lse=True) is None
    packed = jax.ShapeDtypeStruct((1, 5, 2, 8), jnp.float32)
    assert "used" in jflash.l1.explain(packed, packed, packed, cu_seqlens=jax.ShapeDtypeStruct((3,), jnp.int32))
    with pytest.raises(ValueError, match="direction='sideways' must be one of"):
        jflash.l1.why_not(q, k, k, implementation="xla", direction="sideways")


def test_numpy_arrays_are_arrays():
    q, k = np.asarray(Q), np.asarray(K)
    np.testing.assert_array_equal(l1_attention(q, k, k), l1_attention(Q, K, K))

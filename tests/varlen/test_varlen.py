"""Packed sequences against the oracle, sequence by sequence: outputs, lse and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import (
    flash_attention,
    flash_attention_kvpacked,
    flash_attention_qkvpacked,
    flash_attention_varlen,
    flash_attention_varlen_kvpacked,
    flash_attention_varlen_qkvpacked,
)
from tests.parity.cases import booleans, normal, outputs_and_gradients, segments, slopes
from tests.varlen.rule import assert_follows, by_sequence, cu_seqlens, packed

# name: lengths of the queries, of the keys, and tokens behind the last sequence
LENGTHS = {
    "even": ([40, 40, 40], [40, 40, 40], 0),
    "ragged": ([1, 37, 5, 64, 13], [9, 50, 5, 30, 70], 0),
    "zeros": ([0, 30, 0, 0, 25, 17, 0], [12, 0, 0, 20, 40, 11, 0], 0),
    "behind": ([20, 31], [45, 10], 50),
    "one": ([70], [55], 3),
    "single tokens": ([1] * 9, [1] * 9, 0),
}
pytestmark = pytest.mark.usefixtures("small_tiles")


def check(lengths="ragged", dtype="float32", arrays=None, shape=None, **options):
    """flash_attention_varlen of named lengths against the oracle; `arrays` are differentiated too."""
    q_lengths, k_lengths, behind = LENGTHS[lengths]
    cu_q, cu_k = cu_seqlens(*q_lengths), cu_seqlens(*k_lengths)
    tokens = {"Tq": sum(q_lengths) + behind, "Tk": sum(k_lengths) + behind}
    inputs = {**packed(0, jnp.dtype(dtype), **tokens, **(shape or {})), **(arrays or {})}
    static = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "return_lse": True, "implementation": "xla"}
    ours = lambda a: flash_attention_varlen(**a, **static, **options)  # noqa: E731
    oracle = lambda a: by_sequence(**a, cu_q=np.asarray(cu_q), cu_k=np.asarray(cu_k), **options)  # noqa: E731
    assert_follows(ours, oracle, inputs)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths):
    check(lengths, causal=True)


@pytest.mark.parametrize("lengths", ["ragged", "zeros"])
def test_without_causal(lengths):
    check(lengths)


@pytest.mark.parametrize("window", [(7, 3), (None, 4), (11, None), (0, 0)], ids=str)
def test_windows(window):
    check("ragged", window=window)


def test_causal_combines_with_a_window():
    check("zeros", causal=True, window=(6, 9))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype):
    check("ragged", dtype, causal=True)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_alibi(per_sequence):
    check("ragged", alibi_slopes=slopes(1, *((5,) if per_sequence else ()), 4), causal=True)


def test_features_at_once():
    (q_lengths, k_lengths, _), H = LENGTHS["ragged"], 4
    Tq, Tk = sum(q_lengths), sum(k_lengths)
    check(
        "ragged",
        arrays={"bias": normal(2, 1, H, Tq, Tk), "sinks": normal(3, H)},
        shape={"Dv": 24},
        scale=0.4,
        softcap=2.0,
        window=(20, 6),
        mask=booleans(4, 1, 1, Tq, Tk, share=0.8),
        segment_ids=(segments(5, 1, Tq, 2)[0], segments(6, 1, Tk, 2)[0]),
        alibi_slopes=slopes(7, 5, H),
    )


def test_dropout_depends_on_packed_positions():
    """As dense attention whose mask keeps the sequences apart."""
    lengths, Tq = (30, 0, 45), 75
    cu, arrays = cu_seqlens(*lengths), packed(8, Tq=Tq)
    sequence = np.repeat(np.arange(3), lengths)
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(9), "return_lse": True}
    ours = lambda a: flash_attention_varlen(  # noqa: E731
        **a, cu_seqlens_q=cu, cu_seqlens_k=cu, **options, implementation="xla"
    )

    def oracle(arrays):
        dense = {name: x[None] for name, x in arrays.items()}
        mask = jnp.asarray(sequence[:, None] == sequence)
        out, lse = flash_attention(**dense, mask=mask, **options, implementation="reference")
        return out[0], lse[0]

    assert_follows(ours, oracle, arrays)


def test_no_sequence_at_all():
    none = cu_seqlens()
    arrays = packed(10, Tq=9)
    out, lse = flash_attention_varlen(**arrays, cu_seqlens_q=none, cu_seqlens_k=none, return_lse=True)
    assert (out == 0).all()
    assert (lse == -jnp.inf).all()
    empty = {name: x[:0] for name, x in arrays.items()}
    assert flash_attention_varlen(**empty, cu_seqlens_q=none, cu_seqlens_k=none).shape == (0, 4, 16)


def test_lengths_are_known_at_run_time():
    """One compilation for all lengths, and the same bits as without jit."""
    arrays = packed(11, Tq=90)

    @functools.partial(jax.jit, static_argnames="causal")
    def run(arrays, cu, causal=True):
        return flash_attention_varlen(**arrays, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=causal, return_lse=True)

    for lengths in ((90, 0, 0), (10, 20, 30), (1, 1, 88)):
        cu = cu_seqlens(*lengths)
        oracle = by_sequence(**arrays, cu_q=np.asarray(cu), cu_k=np.asarray(cu), causal=True)
        for x, y in zip(run(arrays, cu), oracle, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)
    assert run._cache_size() == 1


def test_tokens_behind_the_last_sequence_are_not_read():
    """NaN there reaches nothing, not even a gradient."""
    cu, arrays = cu_seqlens(23, 10), packed(12, Tq=40)
    poisoned = {name: x.at[33:].set(jnp.nan) for name, x in arrays.items()}
    attend = lambda a: flash_attention_varlen(**a, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)  # noqa: E731
    run = outputs_and_gradients(attend)
    jax.tree.map(np.testing.assert_array_equal, run(arrays), run(poisoned))
    out, gradients = run(poisoned)
    for x in (out, *gradients.values()):
        assert (x[33:] == 0).all()
        assert (x[:33] != 0).any()
    _, pull = jax.vjp(attend, poisoned)
    jax.tree.map(np.testing.assert_array_equal, pull(out), pull(out.at[33:].set(jnp.nan)))


def test_without_jit():
    """Lengths that are known stay numpy's until a jit takes them; with jax.disable_jit none does."""
    q, k, v = packed(5, jnp.float32, Tq=9, Tk=9).values()
    lengths = {"cu_seqlens_q": np.array([0, 4, 8]), "cu_seqlens_k": np.array([0, 3, 9])}
    attend = functools.partial(flash_attention_varlen, q, k, v, **lengths, causal=True, implementation="reference")
    with jax.disable_jit():
        out = attend()
    np.testing.assert_allclose(out, attend(), atol=1e-6)


def test_vmap():
    a, b = packed(13, Tq=60), packed(14, Tq=60)
    cus = jnp.stack([cu_seqlens(60, 0), cu_seqlens(22, 38)])
    one = lambda arrays, cu: flash_attention_varlen(**arrays, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)  # noqa: E731
    both = jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), a, b), cus)
    for n, arrays in enumerate((a, b)):
        np.testing.assert_allclose(both[n], one(arrays, cus[n]), atol=1e-6)


@pytest.mark.parametrize("name", ["qkv", "kv", "varlen qkv", "varlen kv"])
def test_packed_forms(name):
    """The bits of the function of separate arrays, and one packed gradient."""
    cu, varlen = cu_seqlens(20, 13), name.startswith("varlen")
    qkv = normal(15, *((33,) if varlen else (2, 33)), 3, 4, 16)
    q, k, v = jnp.unstack(qkv, axis=-3)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu} if varlen else {}
    plain = flash_attention_varlen if varlen else flash_attention
    expected = outputs_and_gradients(lambda a: plain(**a, **lengths, causal=True))({"q": q, "k": k, "v": v})
    if name.endswith("qkv"):
        lengths = {"cu_seqlens": cu, "max_seqlen": 20} if varlen else {}
        f = flash_attention_varlen_qkvpacked if varlen else flash_attention_qkvpacked
        arrays, slices = {"qkv": qkv}, jnp.stack([expected[1][name] for name in "qkv"], axis=-3)
    else:
        f = flash_attention_varlen_kvpacked if varlen else flash_attention_kvpacked
        arrays, slices = {"q": q, "kv": qkv[..., 1:, :, :]}, jnp.stack([expected[1]["k"], expected[1]["v"]], axis=-3)
    out, gradients = outputs_and_gradients(lambda a: f(**a, **lengths, causal=True))(arrays)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(gradients["qkv" if name.endswith("qkv") else "kv"], slices)


def test_packed_shapes_are_checked():
    with pytest.raises(ValueError, match=r"qkv.shape=\(1, 5, 2, 4, 8\) must be \[batch, seq, 3, heads, dim\]"):
        flash_attention_qkvpacked(jnp.zeros((1, 5, 2, 4, 8)))


GOOD = {"cu_seqlens_q": cu_seqlens(4, 6), "cu_seqlens_k": cu_seqlens(4, 6)}
ERRORS = {
    "dtype": ({"cu_seqlens_q": jnp.zeros(3)}, TypeError, "cu_seqlens_q.dtype=float32 must be int32 or int64"),
    "shape": ({"cu_seqlens_q": jnp.zeros((1, 3), jnp.int32)}, ValueError, r"must be \[N \+ 1\]"),
    "start": ({"cu_seqlens_q": np.array([1, 4, 10])}, ValueError, r"cu_seqlens_q=\[1, 4, 10\] must start at 0"),
    "falls": ({"cu_seqlens_k": np.array([0, 6, 4])}, ValueError, r"cu_seqlens_k=\[0, 6, 4\] must start at 0, never"),
    "total": ({"cu_seqlens_k": np.array([0, 6, 11])}, ValueError, "end at 10 or before"),
    "longest": (
        {"max_seqlen_q": 5},
        ValueError,
        r"max_seqlen=5 must be >= 6, the longest of cu_seqlens_q=\[0, 4, 10\]",
    ),
    "longest type": ({"max_seqlen_q": 6.0}, TypeError, "max_seqlen=6.0 of cu_seqlens_q must be an integer"),
    "counts": ({"cu_seqlens_k": cu_seqlens(10)}, ValueError, r"\(3,\) and \(2,\) must be equal"),
    "slopes": ({"alibi_slopes": jnp.ones((3, 4))}, ValueError, r"alibi_slopes.shape=\(3, 4\) must be"),
    "axes": ({"q": jnp.zeros((1, 10, 4, 16))}, ValueError, r"must have 3 axes: \[tokens, heads, dim\]"),
    "backend": ({"implementation": "hopper"}, NotImplementedError, "must be sm_90"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changed, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        flash_attention_varlen(**{**packed(16, Tq=10), **GOOD, **changed})

"""unpad_input, pad_input and rows of several sequences, with and without jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention_varlen, pad_input, unpad_input, unpad_input_for_concatenated_sequences
from tests.parity.cases import booleans, normal, outputs_and_gradients

MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)


def test_unpad_and_pad():
    x = normal(0, 3, 5, 2, 4)
    packed = unpad_input(x, MASK)
    assert jnp.array_equal(packed.x, x[MASK])
    assert packed.indices.tolist() == np.flatnonzero(MASK).tolist()
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 8]
    assert (packed.max_seqlen, packed.seqused.tolist()) == (5, [3, 0, 5])
    assert packed.cu_seqlens.dtype == packed.indices.dtype == packed.seqused.dtype == jnp.int32
    assert jnp.array_equal(pad_input(packed.x, packed.indices, 3, 5), jnp.where(MASK[:, :, None, None], x, 0))


def test_integers_and_unused_slots():
    """Slots of unused_mask are kept; seqused counts without them."""
    unused = ~MASK & np.array([True, True, False, False, True])
    packed = unpad_input(normal(1, 3, 5), MASK.astype(np.int32), unused_mask=unused)
    assert packed.cu_seqlens.tolist() == [0, 4, 7, 12]
    assert packed.seqused.tolist() == [3, 0, 5]
    assert packed.max_seqlen == 5


def test_under_jit():
    """One compilation for all masks; empty slots are zeros, and pad_input leaves them out."""
    x = normal(2, 3, 5, 4)

    @jax.jit
    def there_and_back(x, mask):
        packed = unpad_input(x, mask, size=11)
        return packed, pad_input(packed.x, packed.indices, 3, 5)

    for mask in (MASK, booleans(3, 3, 5, share=0.5), np.zeros((3, 5), bool)):
        packed, back = there_and_back(x, jnp.asarray(mask))
        exact = unpad_input(x, mask)
        tokens = len(exact.x)
        assert jnp.array_equal(packed.x[:tokens], exact.x)
        assert (packed.x[tokens:] == 0).all()
        assert jnp.array_equal(packed.cu_seqlens, exact.cu_seqlens)
        assert packed.max_seqlen == exact.max_seqlen
        assert jnp.array_equal(back, jnp.where(mask[:, :, None], x, 0))
    assert there_and_back._cache_size() == 1
    assert jnp.isnan(there_and_back(x, np.ones((3, 5), bool))[0].x).all()


def test_gradients():
    """Of the round trip: the cotangent where the mask is, 0 elsewhere."""

    def round_trip(x):
        packed = unpad_input(x, MASK)
        return pad_input(packed.x * 3, packed.indices, 3, 5)

    _, gradient = outputs_and_gradients(round_trip)(normal(4, 3, 5, 2))
    assert jnp.array_equal(gradient, jnp.where(MASK[:, :, None], 3 * normal(90, 3, 5, 2), 0))


def test_concatenated_sequences():
    lengths = np.array([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = normal(5, 3, 6, 4)
    packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert longest == 6
    assert jnp.array_equal(packed, x.reshape(18, 4)[indices])
    static = jax.jit(lambda x, n: unpad_input_for_concatenated_sequences(x, n, size=17, sequences=7))(x, lengths)
    assert static[2].tolist() == [0, 2, 5, 8, 10, 16, 16, 16]
    assert jnp.array_equal(static[0][:16], packed)
    for lengths in ([[2, 3, 1, 0, 0, 0]] * 3, [[3, 4, 0, 0, 0, 0]] * 3):  # nine sequences; more than a row holds
        few = jax.jit(lambda x, n: unpad_input_for_concatenated_sequences(x, n, size=21, sequences=7))
        assert jnp.isnan(few(x, np.array(lengths))[0]).all()


def test_attention_without_padding_is_attention_of_what_is_there():
    q, k, v = (normal(seed, 3, 5, 2, 8) for seed in (6, 7, 8))
    packed = unpad_input(jnp.stack([q, k, v], axis=2), MASK)
    out = flash_attention_varlen(
        *jnp.unstack(packed.x, axis=1), cu_seqlens_q=packed.cu_seqlens, cu_seqlens_k=packed.cu_seqlens, causal=True
    )
    out = pad_input(out, packed.indices, 3, 5)
    assert (out[1] == 0).all()
    alone = flash_attention_varlen(
        *(x[0, MASK[0]] for x in (q, k, v)), cu_seqlens_q=np.array([0, 3]), cu_seqlens_k=np.array([0, 3]), causal=True
    )
    np.testing.assert_allclose(out[0, MASK[0]], alone, atol=1e-6)


ERRORS = {
    "mask shape": (lambda x: unpad_input(x, MASK[:2]), ValueError, r"mask.shape=\(2, 5\) must be \[B, S\]=\[3, 5\]"),
    "mask dtype": (lambda x: unpad_input(x, MASK.astype(np.float32)), TypeError, "mask.dtype=float32 must be bool or"),
    "overlap": (lambda x: unpad_input(x, MASK, unused_mask=MASK), ValueError, "must be False wherever mask is True"),
    "size": (lambda x: unpad_input(x, MASK, size=7), ValueError, "size=7 must be >= 8"),
    "jit": (lambda x: jax.jit(unpad_input)(x, MASK), ValueError, "size must be given under jit"),
    "indices": (
        lambda x: pad_input(x, jnp.arange(4), 3, 5),
        ValueError,
        r"indices int32 \(4,\) must be integers \[T\]=\[3\]",
    ),
    "index": (lambda x: pad_input(x, jnp.arange(3), 1, 1), ValueError, r"indices 0 to 2 must be in \[0, 1\]"),
    "lengths": (
        lambda x: unpad_input_for_concatenated_sequences(x, np.array([[6, 0, 0, 0, 0]] * 3)),
        ValueError,
        r"lengths of the rows, \[6, 6, 6\] in sum, must be >= 0 and <= 5",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call(normal(9, 3, 5))

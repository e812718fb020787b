"""Attention on a key/value cache: against the oracle entry by entry, in every layout, and step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import apply_rotary, flash_attention, flash_attention_with_kvcache
from tests.oracle import assert_close
from tests.parity.cases import normal, slopes
from tests.varlen.test_rotary import tables

B, SC, H, HK, D = 3, 40, 4, 2, 16
LENGTHS = np.array([11, 0, 37], np.int32)
PAGE = 4


def cache(seed, lengths=LENGTHS, dtype=jnp.float32, Dv=D, rows=B, length=SC):
    """k_cache, v_cache with NaN behind the lengths."""
    behind = (np.arange(length) >= np.asarray(lengths)[:, None])[:, :, None, None]
    return tuple(
        jnp.where(behind, jnp.nan, normal(seed + n, rows, length, HK, d)).astype(dtype) for n, d in ((0, D), (1, Dv))
    )


def queries(seed, Sq=1, dtype=jnp.float32):
    return normal(seed, B, Sq, H, D, dtype=dtype)


def new(seed, Sn, dtype=jnp.float32, Dv=D):
    return normal(seed, B, Sn, HK, D, dtype=dtype), normal(seed + 1, B, Sn, HK, Dv, dtype=dtype)


def by_entry(q, k_cache, v_cache, lengths, rows=range(B), leftpad=(0,) * B, alibi_slopes=None, **options):
    """out and lse by the oracle on the keys of each entry alone."""
    found = []
    for b, row in enumerate(rows):
        keys = slice(int(leftpad[b]), int(lengths[b]))
        own = {} if alibi_slopes is None else {"alibi_slopes": np.broadcast_to(alibi_slopes, (B, H))[b]}
        attend = functools.partial(flash_attention, return_lse=True, implementation="reference", **own, **options)
        found.append(attend(q[b : b + 1], k_cache[row : row + 1, keys], v_cache[row : row + 1, keys]))
    return tuple(jnp.concatenate(x) for x in zip(*found, strict=True))


def check(ours, q, k_cache, v_cache, lengths, **options) -> None:
    """out and lse within the rule of tests/oracle.py."""
    low = by_entry(q, k_cache, v_cache, lengths, **options)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k_cache, v_cache)]
        ref = by_entry(*wide, lengths, **options)
    for name, *arrays in zip(("out", "lse"), ours, low, ref, strict=True):
        assert_close(name, *arrays, q.dtype)


def paged(seed, k_cache, v_cache, page=PAGE):
    """The caches cut in pages, in random order among pages of NaN, and their table [rows, n]."""
    rows, length = k_cache.shape[:2]
    n = -(-length // page)
    order = np.random.default_rng(seed).permutation(2 * rows * n)[: rows * n]

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, n * page - length), (0, 0), (0, 0)), constant_values=jnp.nan)
        return (
            jnp.full((2 * rows * n, page, *x.shape[2:]), jnp.nan, x.dtype)
            .at[order]
            .set(x.reshape(-1, page, *x.shape[2:]))
        )

    return cut(k_cache), cut(v_cache), jnp.asarray(order.reshape(rows, n), jnp.int32)


def whole(pages, table, length=SC):
    return pages[table].reshape(table.shape[0], -1, *pages.shape[2:])[:, :length]


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (9, 0), "softcap": 2.0},
    "open window": {"window": (None, 2), "scale": 0.7},
    "alibi": {"causal": True, "alibi_slopes": slopes(0, H)},
    "alibi by entry": {"alibi_slopes": slopes(0, B, H)},
    "sinks": {"causal": True, "sinks": normal(0, H)},
}


READING = [*((name, 5, "xla") for name in OPTIONS), ("plain", 1, "xla"), ("causal", 1, "xla")]


@pytest.mark.parametrize(("options", "Sq", "implementation"), [*READING, ("sinks", 5, "reference")])
def test_reading(options, Sq, implementation):
    """Without new keys; what lies behind the lengths is NaN and never shows."""
    options = OPTIONS[options]
    q, (k_cache, v_cache) = queries(1, Sq), cache(2)
    out, k_after, v_after, lse = flash_attention_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=LENGTHS, return_lse=True, implementation=implementation, **options
    )
    check((out, lse), q, k_cache, v_cache, LENGTHS, **options)
    np.testing.assert_array_equal(k_after, k_cache)
    np.testing.assert_array_equal(v_after, v_cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["rows", "pages", "large pages"])
def test_appending(layout, dtype):
    """New keys go behind the old; everything else in the cache stays as it was, bit for bit."""
    dtype, Sn = jnp.dtype(dtype), 3
    q, (k, v) = queries(3, Sn, dtype), new(4, Sn, dtype, Dv=24)
    k_cache, v_cache = cache(6, dtype=dtype, Dv=24)
    expected = [np.array(k_cache), np.array(v_cache)]
    for b, length in enumerate(LENGTHS):
        for x, y in zip(expected, (k, v), strict=True):
            x[b, length : length + Sn] = y[b]
    table = {}
    if layout != "rows":
        k_cache, v_cache, table["block_table"] = paged(7, k_cache, v_cache, PAGE if layout == "pages" else 20)
    out, k_cache, v_cache, lse = flash_attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS, causal=True, return_lse=True, **table
    )
    if table:
        k_cache, v_cache = (whole(x, table["block_table"]) for x in (k_cache, v_cache))
    for x, y in zip((k_cache, v_cache), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    check((out, lse), q, *expected, LENGTHS + Sn, causal=True)


@pytest.mark.parametrize("page", [1, 3, 16, 600, 1100])
def test_any_page(page):
    """Longer than a block of keys, shorter, or in between; with integers that are wide by default, too."""
    lengths = np.array([1100, 3, 700], np.int32)
    q, (k_cache, v_cache) = queries(8, 2), cache(9, lengths, length=1100)
    k_pages, v_pages, table = paged(10, k_cache, v_cache, page)
    with jax.enable_x64(page % 2 == 0):
        out, _, _, lse = flash_attention_with_kvcache(
            q, k_pages, v_pages, cache_seqlens=lengths, block_table=table, causal=True, return_lse=True
        )
    check((out, lse), q, k_cache, v_cache, lengths, causal=True)


def test_long_rows():
    """Of several blocks, the last of them moved up to fit."""
    lengths = np.array([1290, 1000, 513], np.int32)
    q, (k_cache, v_cache) = queries(11, 2), cache(12, lengths, length=1300)
    out, _, _, lse = flash_attention_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=lengths, window=(700, 0), return_lse=True
    )
    check((out, lse), q, k_cache, v_cache, lengths, window=(700, 0))


def test_many_queries_at_once():
    """More than one block of them."""
    from jflash.xla import decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_SCORES_IN_FLIGHT", {"cpu": 1})
        jax.clear_caches()
        q, (k_cache, v_cache) = queries(13, 37), cache(14)
        out, _, _, lse = flash_attention_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=LENGTHS, causal=True, return_lse=True
        )
        check((out, lse), q, k_cache, v_cache, LENGTHS, causal=True)
    jax.clear_caches()


def test_left_padding():
    """Keys before it are not read, NaN or not; positions are those of the cache."""
    leftpad = np.array([3, 0, 37], np.int32)
    q, (k_cache, v_cache) = queries(15, 2), cache(16)
    before = (np.arange(SC) < leftpad[:, None])[:, :, None, None]
    k_cache, v_cache = (jnp.where(before, jnp.nan, x) for x in (k_cache, v_cache))
    for options in ({"causal": True}, {"alibi_slopes": slopes(0, H)}):
        out, _, _, lse = flash_attention_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=LENGTHS, cache_leftpad=leftpad, return_lse=True, **options
        )
        check((out, lse), q, k_cache, v_cache, LENGTHS, leftpad=leftpad, **options)


def test_rows_of_a_larger_cache():
    """cache_batch_idx, repeated where nothing is written."""
    lengths = np.array([8, 20, 5, 31, 40], np.int32)
    q, (k_cache, v_cache) = queries(17), cache(18, lengths, rows=5)
    for rows in ([4, 0, 3], [3, 3, 1]):
        out, _, _, lse = flash_attention_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=lengths[rows], cache_batch_idx=np.array(rows), return_lse=True
        )
        check((out, lse), q, k_cache, v_cache, lengths[rows], rows=rows)
    k, v = new(19, 1)
    out, k_after, _ = flash_attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths[[0, 3, 2]], cache_batch_idx=np.array([0, 3, 2])
    )
    assert jnp.array_equal(k_after[3, 31], k[1, 0])
    np.testing.assert_array_equal(k_after[1], k_cache[1])


def test_one_length_for_all():
    q, (k_cache, v_cache) = queries(20), cache(21, [25] * B)
    out = flash_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=25)[0]
    assert jnp.array_equal(out, flash_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=np.full(B, 25))[0])
    hinted = flash_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=25, num_splits=3)[0]
    np.testing.assert_allclose(out, hinted, atol=1e-6)
    full = cache(21, [SC] * B)
    default = flash_attention_with_kvcache(q, *full)[0]
    np.testing.assert_allclose(default, flash_attention(q, *full), atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (20, -1)}], ids=str)
def test_rotary(options, interleaved):
    """New keys turn by their position; queries by theirs, or all by the first's without causal and window."""
    Sn = 3
    q, (k, v), (k_cache, v_cache), (cos, sin) = queries(22, Sn), new(23, Sn), cache(25), tables(SC + 3)
    turn = functools.partial(apply_rotary, cos=cos, sin=sin, interleaved=interleaved, offsets=LENGTHS)
    turned_k = turn(k)
    if options:
        turned_q = turn(q)
    else:
        turned_q = jnp.concatenate([turn(q[:, i : i + 1]) for i in range(Sn)], axis=1)
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    out, k_after, _ = flash_attention_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=LENGTHS, **rotary, **options
    )
    expected = flash_attention_with_kvcache(turned_q, k_cache, v_cache, turned_k, v, cache_seqlens=LENGTHS, **options)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(k_after, expected[1], atol=1e-6)


@pytest.mark.parametrize("use_pages", [False, True])
def test_step_by_step_equals_prefill(use_pages):
    """A prefill of 5 tokens, then tokens one by one: the rows of causal attention on all of them."""
    S = 18
    q, (k, v), (cos, sin) = queries(26, S), new(27, S), tables(S)
    turn = functools.partial(apply_rotary, cos=cos, sin=sin)
    expected = flash_attention(turn(q), turn(k), v, causal=True, implementation="reference")
    caches, table = cache(29, [0] * B, length=20), {}
    if use_pages:
        *caches, table["block_table"] = paged(30, *caches)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(caches, q, k, v, lengths):
        rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False}
        out, *caches = flash_attention_with_kvcache(
            q, *caches, k, v, cache_seqlens=lengths, causal=True, **rotary, **table
        )
        return out, caches

    outs = []
    for start, end in [(0, 5), *((n, n + 1) for n in range(5, S))]:
        at = slice(start, end)
        out, caches = step(list(caches), q[:, at], k[:, at], v[:, at], jnp.full(B, start, jnp.int32))
        outs.append(out)
    assert step._cache_size() == 2
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, atol=2e-6)


@pytest.mark.parametrize("use_pages", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_jitted_step_copies_no_cache(dtype, use_pages):
    """Both caches are updated where they are, and a step needs room for two blocks of keys."""
    dtype, (b, length, page) = jnp.dtype(dtype), (4, 16384, 16)
    rows, width = (b * length // page, page) if use_pages else (b, length)
    array = jax.ShapeDtypeStruct
    shapes = {name: array((b, 1, n, 64), dtype) for name, n in (("q", 8), ("k", 8), ("v", 8))}
    shapes |= {name: array((rows, width, 8, 64), dtype) for name in ("k_cache", "v_cache")}
    shapes["cache_seqlens"] = array((b,), jnp.int32)
    if use_pages:
        shapes["block_table"] = array((b, length // page), jnp.int32)
    step = jax.jit(flash_attention_with_kvcache, donate_argnames=("k_cache", "v_cache"))
    found = step.lower(**shapes).compile().memory_analysis()
    one_cache = b * length * 8 * 64 * dtype.itemsize
    assert found.alias_size_in_bytes == 2 * one_cache
    assert found.temp_size_in_bytes < one_cache / 4


def test_vmap_and_zero_entries():
    q, (k_cache, v_cache) = queries(31), cache(32)
    each = jax.vmap(lambda q, k, v, n: flash_attention_with_kvcache(q[None], k[None], v[None], cache_seqlens=n)[0][0])(
        q, k_cache, v_cache, LENGTHS
    )
    np.testing.assert_allclose(
        each, flash_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=LENGTHS)[0], atol=1e-6
    )
    assert flash_attention_with_kvcache(q[:0], k_cache[:0], v_cache[:0], cache_seqlens=3)[0].shape == (0, 1, H, D)


def test_no_gradient():
    q, (k_cache, v_cache) = queries(33), cache(34)
    with pytest.raises(NotImplementedError, match="flash_attention_with_kvcache has no gradient"):
        jax.grad(lambda q: flash_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=3)[0].sum())(q)


TABLE = np.arange(3 * 10, dtype=np.int32).reshape(3, 10)
BAD = {
    "room": (
        {"cache_seqlens": np.array([11, 0, 38])},
        ValueError,
        r"\[11, 0, 38\] and 3 new keys must be >= 0, and in",
    ),
    "overflow": ({"cache_seqlens": np.array([11, 0, 2**31 - 1])}, ValueError, "and 3 new keys must be >= 0, and in"),
    "negative": ({"cache_seqlens": np.array([-1, 0, 3])}, ValueError, r"cache_seqlens=\[-1, 0, 3\]"),
    "row": ({"cache_batch_idx": np.array([0, 1, 3])}, ValueError, r"rows 0 to 3 of .* must be in \[0, 3\)"),
    "positions": ({"rotary_cos": tables(39)[0], "rotary_sin": tables(39)[1]}, ValueError, "40 positions or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_values_out_of_range(name):
    """An error where they are known; under jit NaN in the entry's out, and its cache untouched."""
    changed, error, message = BAD[name]
    q, (k, v), (k_cache, v_cache) = queries(35, 3), new(36, 3), cache(38)
    lengths = {"cache_seqlens": LENGTHS, **{n: x for n, x in changed.items() if n.startswith("cache")}}
    rest = {n: x for n, x in changed.items() if not n.startswith("cache")}
    with pytest.raises(error, match=message):
        flash_attention_with_kvcache(q, k_cache, v_cache, k, v, **lengths, **rest, causal=True)
    run = jax.jit(functools.partial(flash_attention_with_kvcache, causal=True))
    out, k_after, v_after = run(q, k_cache, v_cache, k, v, **lengths, **rest)
    bad = {"negative": 0}.get(name, 2)
    for b in range(B):
        assert jnp.isnan(out[b]).all() == (b == bad)
    np.testing.assert_array_equal(k_after[bad], k_cache[bad])
    np.testing.assert_array_equal(v_after[bad], v_cache[bad])


def test_a_page_out_of_range():
    """Only if it is in use: what the table says of pages not reached does not matter."""
    q, (k, v), (k_cache, v_cache) = queries(39, 1), new(40, 1), cache(42)
    k_pages, v_pages, table = paged(43, k_cache, v_cache)
    call = functools.partial(flash_attention_with_kvcache, q, k_pages, v_pages, k, v, cache_seqlens=LENGTHS)
    expected = call(block_table=table)[0]
    unused = table.at[0, 3:].set(-1).at[1, 1:].set(10**6)
    np.testing.assert_array_equal(call(block_table=unused)[0], expected)
    used = table.at[0, 1].set(len(k_pages))
    with pytest.raises(ValueError, match="of block_table or cache_batch_idx must be in"):
        call(block_table=used)
    out, k_after, _ = jax.jit(call)(block_table=used)
    assert jnp.isnan(out[0]).all()
    np.testing.assert_array_equal(out[1:], expected[1:])
    np.testing.assert_array_equal(k_after[table[0]], k_pages[table[0]])


ERRORS = {
    "both": ({"block_table": TABLE, "cache_batch_idx": np.arange(3)}, ValueError, "must not both be given"),
    "k alone": ({"v": None}, ValueError, "k and v must be given together"),
    "no seqlens": ({"cache_seqlens": None}, ValueError, "k and v need cache_seqlens"),
    "twice": ({"cache_batch_idx": np.array([0, 1, 1])}, ValueError, r"rows \[0, 1, 1\] .* must be different"),
    "batch": ({"k_cache": normal(0, 4, SC, HK, D), "v_cache": normal(0, 4, SC, HK, D)}, ValueError, "3 and 4, must be"),
    "k shape": ({"k": normal(0, B, 1, HK, 8)}, ValueError, r"k.shape=\(3, 1, 2, 8\) must be \[B, Sn, 2, 16\]"),
    "k dtype": ({"k": normal(0, B, 1, HK, D, dtype=jnp.bfloat16)}, TypeError, "k.dtype=bfloat16 must be the cache's"),
    "cache dtype": (
        {"q": queries(0, dtype=jnp.bfloat16)},
        TypeError,
        "dtypes bfloat16, float32, float32 must be equal",
    ),
    "index dtype": ({"cache_seqlens": jnp.zeros(3)}, TypeError, "cache_seqlens.dtype=float32 must be an integer type"),
    "seqlens shape": ({"cache_seqlens": np.zeros(2, int)}, ValueError, r"cache_seqlens.shape=\(2,\) must be"),
    "rotary dim": ({"rotary_cos": normal(0, 40, 9), "rotary_sin": normal(0, 40, 9)}, ValueError, "rotary dim R=18"),
    "half rotary": ({"rotary_cos": tables()[0]}, ValueError, "must be given together"),
    "splits": ({"num_splits": -1}, ValueError, "num_splits=-1 must be >= 0"),
    "backend": ({"implementation": "cuda"}, ValueError, "must be None or one of 'hopper', 'xla', 'reference'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changed, error, message = ERRORS[name]
    k_cache, v_cache = cache(44)
    k, v = new(46, 1)
    arguments = {"q": queries(45), "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": LENGTHS}
    with pytest.raises(error, match=message):
        flash_attention_with_kvcache(**{**arguments, **changed})


def test_rotary_needs_new_keys():
    cos, sin = tables()
    with pytest.raises(ValueError, match="rotary_cos and rotary_sin need k and v"):
        flash_attention_with_kvcache(queries(47), *cache(48), rotary_cos=cos, rotary_sin=sin, cache_seqlens=3)

"""flash_attn_with_kvcache: the JAX function's results, and caches written in place."""

import jax
import jax.numpy as jnp
import pytest
import torch

import jflash
from interop import apply_rotary_emb, flash_attn_func, flash_attn_with_kvcache

B, SC, H, HK, D = 3, 40, 4, 2, 16
LENGTHS = torch.tensor([11, 0, 37], dtype=torch.int32)
SLOPES = torch.rand(H, generator=torch.Generator().manual_seed(0))


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(positions=SC, R=12):
    angle = torch.outer(torch.arange(positions), 100.0 ** -(torch.arange(R // 2) / (R // 2)))
    return angle.cos(), angle.sin()


def arguments(Sn=3, pages=None, dtype=torch.float32):
    """Everything of a call, with NaN behind the lengths; `pages` of that size in random order."""
    found = {"q": normal(1, B, Sn, H, D, dtype=dtype), "cache_seqlens": LENGTHS}
    behind = (torch.arange(SC) >= LENGTHS[:, None])[:, :, None, None]
    for n, name in enumerate("kv"):
        cache = normal(2 + n, B, SC, HK, D, dtype=dtype).masked_fill(behind, torch.nan)
        if pages:
            order = torch.randperm(B * SC // pages, generator=torch.Generator().manual_seed(4))
            cache = torch.zeros(B * SC // pages, pages, HK, D, dtype=dtype).index_put(
                (order,), cache.reshape(-1, pages, HK, D)
            )
            found["block_table"] = order.reshape(B, -1).to(torch.int32)
        found[f"{name}_cache"] = cache
        found[name] = normal(5 + n, B, Sn, HK, D, dtype=dtype)
    return found


def by_jax(found, **options):
    """(out, k_cache, v_cache, lse) of jflash on copies."""
    arrays = {
        n: x
        if x is None or isinstance(x, int)
        else jnp.asarray(x.float().numpy() if x.is_floating_point() else x.numpy())
        for n, x in found.items()
    }
    results = jflash.flash_attention_with_kvcache(**arrays, **options, return_lse=True)
    return [torch.tensor(jax.device_get(x)) for x in results]


COS, SIN = tables()
ROTARY = {"rotary_cos": COS, "rotary_sin": SIN}
CASES = {
    "plain": ({}, {}, None),
    "causal": ({"causal": True}, {"causal": True}, None),
    "pages": ({"causal": True}, {"causal": True}, 4),
    "rotary": ({"causal": True, **ROTARY}, {"causal": True}, None),
    "rotary at one position": ({**ROTARY, "rotary_interleaved": False}, {"rotary_interleaved": False}, 8),
    "everything": (
        {"window_size": (9, 1), "softcap": 2.0, "softmax_scale": 0.4, "alibi_slopes": SLOPES},
        {"window": (9, 1), "softcap": 2.0, "scale": 0.4},
        None,
    ),
    "left padding": (
        {"cache_leftpad": torch.tensor([2, 0, 30], dtype=torch.int32), "causal": True},
        {"causal": True},
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_jax(name):
    options, jax_options, pages = CASES[name]
    found = arguments(pages=pages)
    tensors = {n: x for n, x in options.items() if isinstance(x, torch.Tensor)}
    expected = by_jax({**found, **tensors}, **jax_options)
    before = found["k_cache"].data_ptr()
    out, lse = flash_attn_with_kvcache(**found, **options, return_softmax_lse=True)
    assert found["k_cache"].data_ptr() == before
    for x, y in zip((out, found["k_cache"], found["v_cache"], lse), expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reading_only(dtype):
    found = arguments(Sn=1, dtype=dtype)
    found = {n: x for n, x in found.items() if n not in "kv"}
    out = flash_attn_with_kvcache(**found)
    assert out.dtype == dtype
    low = by_jax(found)[0]
    torch.testing.assert_close(out.float(), low, atol=2e-2, rtol=2e-2)


def test_positional_arguments_are_flash_attns():
    found = arguments()
    rows = torch.tensor([2, 0, 1], dtype=torch.int32)
    copies = {n: x.clone() for n, x in found.items()}
    named = flash_attn_with_kvcache(**found, cache_batch_idx=rows, softmax_scale=0.3, causal=True, window_size=(6, -1))
    q, k_cache, v_cache, k, v = (copies[n] for n in ("q", "k_cache", "v_cache", "k", "v"))
    placed = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, None, None, LENGTHS, rows, None, None, 0.3, True, (6, -1)
    )
    torch.testing.assert_close(named, placed, equal_nan=True)
    torch.testing.assert_close(found["k_cache"], k_cache, equal_nan=True)


def test_step_by_step_equals_prefill():
    S, (cos, sin) = 12, tables()
    q, k, v = (normal(10 + n, B, S, h, D) for n, h in enumerate((H, HK, HK)))
    turn = lambda x: apply_rotary_emb(x, cos, sin)  # noqa: E731
    expected = flash_attn_func(turn(q), turn(k), v, causal=True)
    caches = [torch.full((B, 16, HK, D), torch.nan) for _ in range(2)]
    outs = []
    for start, end in [(0, 5), *((n, n + 1) for n in range(5, S))]:
        at = slice(start, end)
        outs.append(
            flash_attn_with_kvcache(
                q[:, at], *caches, k[:, at], v[:, at], cos, sin, start, causal=True, rotary_interleaved=False
            )
        )
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, atol=2e-6, rtol=1e-5)


def test_compile():
    """The caches are written in place there too."""
    eager, compiled = arguments(), arguments()
    step = lambda a: flash_attn_with_kvcache(**a, causal=True, rotary_cos=COS, rotary_sin=SIN)  # noqa: E731
    expected = step(eager)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(compiled["k_cache"], eager["k_cache"], equal_nan=True)


ERRORS = {
    "room": ({"cache_seqlens": torch.tensor([11, 0, 38])}, ValueError, r"\[11, 0, 38\] and 3 new keys must be >= 0"),
    "rows": ({"cache_batch_idx": torch.tensor([0, 1, 3])}, ValueError, r"rows \[0, 1, 3\] .* must be in \[0, 3\)"),
    "twice": ({"cache_batch_idx": torch.tensor([0, 1, 1])}, ValueError, "which get new keys, must be different"),
    "both": ({"block_table": LENGTHS[:, None], "cache_batch_idx": LENGTHS}, ValueError, "must not both be given"),
    "position": ({"rotary_cos": COS[:39], "rotary_sin": SIN[:39]}, ValueError, "which must be <= 36"),
    "half": ({"rotary_cos": COS}, ValueError, "must be given together"),
    "rotary dim": ({"rotary_cos": normal(0, 40, 9), "rotary_sin": normal(0, 40, 9)}, ValueError, "rotary dim R=18"),
    "k alone": ({"v": None}, ValueError, "k and v must be given together"),
    "no seqlens": ({"cache_seqlens": None}, ValueError, "k and v need cache_seqlens"),
    "shape": ({"k": normal(0, B, 3, HK, 8)}, ValueError, r"k.shape=\[3, 3, 2, 8\] must be \[B, Sn, 2, 16\]"),
    "dtype": ({"k": normal(0, B, 3, HK, D).half()}, TypeError, "k is torch.float16 on cpu, must be the cache's"),
    "index": ({"cache_seqlens": LENGTHS.float()}, TypeError, "cache_seqlens.dtype=torch.float32 must be"),
    "gradient": ({"q": normal(0, B, 3, H, D).requires_grad_()}, NotImplementedError, "has no gradient"),
    "gradient of a cache": ({"v_cache": normal(0, B, 40, HK, D).requires_grad_()}, NotImplementedError, "has no grad"),
    "splits": ({"num_splits": -1}, ValueError, "num_splits=-1 must be"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_leave_the_caches_alone(name):
    changed, error, message = ERRORS[name]
    found = {**arguments(), **changed}
    before = found["k_cache"].clone(), found["v_cache"].clone()
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(**found)
    torch.testing.assert_close((found["k_cache"], found["v_cache"]), before, equal_nan=True, rtol=0, atol=0)


def test_forward_mode_raises():
    found = arguments()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: flash_attn_with_kvcache(**{**found, "q": q}), (found["q"],), (found["q"],))


def test_unknown_values_write_nothing_and_give_nan(monkeypatch):
    """As on a GPU, where values are not waited for."""
    monkeypatch.setattr("interop._arguments.values_are_known", lambda x: False)
    found = {**arguments(pages=4), "cache_seqlens": torch.tensor([11, 0, 38])}
    found["block_table"][1, 0] = 10**6
    before = found["k_cache"].clone()
    out = flash_attn_with_kvcache(**found, causal=True)
    assert out[1:].isnan().all()
    assert out[0].isfinite().all()
    table = found["block_table"].long()
    changed = (found["k_cache"].nan_to_num(7) != before.nan_to_num(7)).flatten(1).any(1).nonzero().ravel().tolist()
    assert changed == sorted(table[0, 2:4].tolist())

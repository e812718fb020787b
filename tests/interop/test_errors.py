"""What raises, with the value and the rule in the message; the same under torch.compile."""

import math

import pytest
import torch

from interop import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    scaled_dot_product_attention,
)
from interop.attention import attention
from interop.operands import Options

Q, K = torch.zeros(2, 5, 4, 8), torch.zeros(2, 7, 2, 8)


def call(q=Q, k=K, v=K, **options):
    return flash_attn_func(q, k, v, **options)


def sdpa(q=Q, k=K, v=K, **options):
    options = {"enable_gqa": True} | options
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)


def direct(q=Q, k=K, v=K, **operands):
    return attention(q, k, v, Options(), **operands)


def ids(length):
    return torch.zeros(2, length, dtype=torch.int64)


RAISES = [
    (lambda: call(q=Q[0]), ValueError, r"q.shape=\[5, 4, 8\] must have 4 axes: \[batch, seq, heads, dim\]"),
    (lambda: call(q=[[0.0]]), TypeError, "q must be a torch.Tensor, got builtins.list"),
    (lambda: call(k=[[0.0]]), TypeError, "k must be a torch.Tensor, got builtins.list"),
    (
        lambda: call(q=Q.int(), k=K.int(), v=K.int()),
        TypeError,
        "q.dtype=torch.int32 must be one of torch.float16",
    ),
    (lambda: call(q=Q.cfloat()), TypeError, "q.dtype=torch.complex64 must be one of torch.float16"),
    (
        lambda: call(v=K.half()),
        TypeError,
        "q, k, v dtypes torch.float32, torch.float32, torch.float16 must be equal",
    ),
    (lambda: call(k=K[:1], v=K[:1]), ValueError, "q, k, v batch sizes 2, 1, 1 must be equal"),
    (
        lambda: call(v=K[:, :6]),
        ValueError,
        r"\(seq, heads\) of k and v, \[7, 2\] and \[6, 2\], must be equal",
    ),
    (lambda: call(k=K[..., :4]), ValueError, "head dims of q and k, 8 and 4, must be equal"),
    (
        lambda: call(q=Q.repeat(1, 1, 1, 33), k=K.repeat(1, 1, 1, 33)),
        ValueError,
        "head_dim=264 must be <= 256 and >= 1",
    ),
    (lambda: call(v=K.repeat(1, 1, 1, 33)), ValueError, "value head_dim=264 must be <= 256"),
    (lambda: call(q=Q[..., :0], k=K[..., :0]), ValueError, "head_dim=0 must be <= 256 and >= 1"),
    (lambda: call(q=Q[:, :, :3]), ValueError, "query heads=3 must be a multiple of key/value heads=2"),
    (lambda: call(q=Q[:, :, :0]), ValueError, "query heads=0 must be a multiple"),
    (lambda: call(window_size=(-2, 0)), ValueError, "window_size left=-2 must be >= 0, or -1 for unbounded"),
    (lambda: call(window_size=(0, 1.5)), TypeError, "window_size right=1.5 must be an integer"),
    (lambda: call(window_size=(True, 0)), TypeError, "window_size left=True must be an integer"),
    (lambda: call(window_size=5), TypeError, r"window_size=5 must be a pair \(left, right\)"),
    (lambda: call(softcap=-1.0), ValueError, "softcap=-1.0 must be > 0, or 0 for no cap"),
    (lambda: call(softcap=None), TypeError, "softcap=None must be a number"),
    (lambda: call(softmax_scale=math.nan), ValueError, "softmax_scale=nan must be finite"),
    (lambda: call(softmax_scale=math.inf), ValueError, "softmax_scale=inf must be finite"),
    (lambda: call(softmax_scale=Q[0, 0, 0, 0]), TypeError, r"softmax_scale=tensor\(0.\) must be a number"),
    (lambda: call(dropout_p=1.0), ValueError, r"dropout_p=1.0 must be in \[0, 1\)"),
    (lambda: call(dropout_p=-0.1), ValueError, r"dropout_p=-0.1 must be in \[0, 1\)"),
    (lambda: call(dropout_p=True), TypeError, "dropout_p=True must be a number"),
    (
        lambda: call(alibi_slopes=torch.zeros(3)),
        ValueError,
        r"alibi_slopes.shape=\[3\] must be \[H\]=\[4\] or \[B, H\]=\[2, 4\]",
    ),
    (
        lambda: call(alibi_slopes=torch.zeros(1, 4)),
        ValueError,
        r"alibi_slopes.shape=\[1, 4\] must be \[H\]=\[4\] or \[B, H\]=\[2, 4\]",
    ),
    (
        lambda: call(alibi_slopes=Q[0, 0, :, 0].half()),
        TypeError,
        "alibi_slopes.dtype=torch.float16 must be torch.float32",
    ),
    (lambda: call(alibi_slopes=0.5), TypeError, "alibi_slopes must be a torch.Tensor, got builtins.float"),
    (
        lambda: call(alibi_slopes=torch.zeros(4, requires_grad=True)),
        NotImplementedError,
        "alibi_slopes has no gradient: detach it",
    ),
    (
        lambda: torch.func.grad(lambda s: call(alibi_slopes=s).sum())(torch.zeros(4)),
        NotImplementedError,
        "alibi_slopes has no gradient: detach it",
    ),
    (
        lambda: call(alibi_slopes=torch.zeros(2, 4, 5)),
        ValueError,
        r"alibi_slopes.shape=\[2, 4, 5\] must be \[H\]=\[4\] or \[B, H\]=\[2, 4\]",
    ),
    (
        lambda: flash_attn_qkvpacked_func(torch.zeros(2, 5, 2, 4, 8)),
        ValueError,
        r"qkv.shape=\[2, 5, 2, 4, 8\] must be \[batch, seq, 3, heads, dim\]",
    ),
    (
        lambda: flash_attn_kvpacked_func(Q, K),
        ValueError,
        r"kv.shape=\[2, 7, 2, 8\] must have 5 axes: \[batch, seq, 2, heads, dim\]",
    ),
    (
        lambda: scaled_dot_product_attention(Q[0, 0, 0], K[0], K[0]),
        ValueError,
        r"query.shape=\[8\] must have 4 axes: \[batch, heads, seq, dim\]",
    ),
    (
        lambda: scaled_dot_product_attention(Q[:, None], Q[None], Q[:, None]),
        ValueError,
        r"key.shape=\[1, 2, 5, 4, 8\] must begin as query.shape=\[2, 1, 5, 4, 8\] does",
    ),
    (
        lambda: sdpa(enable_gqa=False),
        ValueError,
        "query heads=4 and key heads=2 must be equal without enable_gqa",
    ),
    (lambda: sdpa(v=K[:, :6]), ValueError, "lengths of key and value, 7 and 6, must be equal"),
    (
        lambda: sdpa(attn_mask=torch.ones(5, 7) > 0, is_causal=True),
        ValueError,
        "attn_mask with is_causal=True must be None",
    ),
    (
        lambda: sdpa(attn_mask=torch.zeros(5, 6)),
        ValueError,
        r"attn_mask.shape=\[5, 6\] must broadcast to \[B, H, Sq, Sk\]=\[2, 4, 5, 7\]",
    ),
    (
        lambda: sdpa(attn_mask=torch.zeros(1, 1, 1, 5, 7)),
        ValueError,
        r"attn_mask.shape=\[1, 1, 1, 5, 7\] must broadcast",
    ),
    (
        lambda: sdpa(attn_mask=torch.zeros(5, 7, dtype=torch.int64)),
        TypeError,
        "attn_mask.dtype=torch.int64 must be torch.bool, torch.float32 or the inputs' torch.float32",
    ),
    (lambda: sdpa(attn_mask=0.0), TypeError, "attn_mask must be a torch.Tensor, got builtins.float"),
    (lambda: sdpa(scale=math.nan), ValueError, "scale=nan must be finite"),
    (lambda: call(v=K.to("meta")), ValueError, "v.device=meta must be cpu, as of the queries"),
    (
        lambda: call(alibi_slopes=torch.zeros(4, device="meta")),
        ValueError,
        "alibi_slopes.device=meta must be cpu",
    ),
    (
        lambda: sdpa(attn_mask=torch.zeros(5, 7, device="meta")),
        ValueError,
        "attn_mask.device=meta must be cpu",
    ),
]


RAISES += [
    (
        lambda: direct(segment_ids=(ids(5), ids(6))),
        ValueError,
        r"key segment_ids.shape=\[2, 6\] must be \[B, S\]=\[2, 7\]",
    ),
    (
        lambda: direct(segment_ids=(ids(5).float(), ids(7))),
        TypeError,
        "query segment_ids.dtype=torch.float32 must be an integer type",
    ),
    (lambda: direct(sinks=torch.zeros(3)), ValueError, r"sinks.shape=\[3\] must be \[H\]=\[4\] or \[B, H\]"),
    (
        lambda: direct(sinks=torch.zeros(4).double()),
        TypeError,
        "sinks.dtype=torch.float64 must be torch.float32 or the inputs' torch.float32",
    ),
    (
        lambda: direct(k=K[:, :0], v=K[:, :0], sinks=torch.zeros(4)),
        ValueError,
        r"k.shape=\[2, 0, 2, 8\] must have a key where there are sinks",
    ),
]


@pytest.mark.parametrize(("function", "error", "message"), RAISES, ids=[m[:40] for *_, m in RAISES])
def test_raises(function, error, message):
    with pytest.raises(error, match=message):
        function()


def test_compiled_call_raises_the_same():
    compiled = torch.compile(flash_attn_func, backend="eager")
    with pytest.raises(ValueError, match="query heads=3 must be a multiple of key/value heads=2"):
        compiled(Q[:, :, :3], K, K)


def test_other_layouts_of_memory_are_refused():
    with pytest.raises((NotImplementedError, RuntimeError)):
        call(q=Q.to_sparse())

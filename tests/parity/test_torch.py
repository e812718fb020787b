"""PyTorch as an independent reference: its own SDPA, and formulas differentiated by its autograd."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import flash_attention
from tests.oracle import assert_close, inputs
from tests.parity.cases import booleans, normal, outputs_and_gradients, segments, slopes

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("small_tiles")

B, SQ, SK, H = 2, 70, 90, 4
ONE = {"B": B, "Sq": SQ, "Sk": SK, "H": H, "D": 24, "Dv": 16}
AHEAD = torch.arange(SK) - (torch.arange(SQ)[:, None] + SK - SQ)  # how far a key is ahead of the query


def check(theirs, arrays: dict, outputs: int = 1, **options):
    """Outputs and gradients by the rule: torch in float64 is `ref`, torch in our dtype is `lo`."""
    dtype = arrays["q"].dtype
    shapes = ((B, arrays["q"].shape[1], H, arrays["v"].shape[3]), (B, H, arrays["q"].shape[1]))
    cotangents = [np.asarray(normal(90 + n, *shape)) for n, shape in enumerate(shapes[:outputs])]
    low, ref = (_by_torch(theirs, arrays, cotangents, kind) for kind in (torch.float32, torch.float64))
    attend = functools.partial(flash_attention, **options, return_lse=True)
    results, grads = outputs_and_gradients(lambda a: attend(**a)[:outputs])(arrays, cotangents)
    ours = dict(zip(("out", "lse"), results, strict=False)) | {f"d{name}": grads[name] for name in arrays}
    for name, lo, r in zip(ours, low, ref, strict=True):
        assert_close(name, ours[name], lo, r, dtype)


def _by_torch(theirs, arrays, cotangents, dtype):
    tensors = {name: torch.tensor(np.asarray(x), dtype=dtype, requires_grad=True) for name, x in arrays.items()}
    results = theirs(**tensors)
    results = results if isinstance(results, tuple) else (results,)
    cotangents = [torch.tensor(ct, dtype=dtype) for ct in cotangents]
    grads = torch.autograd.grad(results, list(tensors.values()), cotangents)
    return [x.detach().numpy() for x in (*results, *grads)]


def sdpa(q, k, v, bias=None, **options):
    """torch's own, in our layout."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=options.pop("mask", bias), **options).transpose(1, 2)


def by_definition(
    q, k, v, bias=None, sinks=None, *, scale=None, softcap=None, distance_slopes=None, seen=None, kept=None
):
    """out and lse as their formulas, with one logit more where there are sinks."""
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s if bias is None else s + bias
    s = s if distance_slopes is None else s - distance_slopes.to(s.dtype)
    s = s if seen is None else s.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:3], 1)], dim=-1)
    p = s.softmax(-1)[..., : k.shape[1]]
    p = p if kept is None else p * kept
    return torch.einsum("bhij,bjhd->bihd", p, v), s.logsumexp(-1)


def tensor(x):
    return torch.tensor(np.asarray(x))


def band(left: int, right: int):
    """Which keys a window shows."""
    return (-left <= AHEAD) & (right >= AHEAD)


def kept(arrays, options):
    """The dropout mask of `flash_attention` itself, read off the identity as v."""
    eye = jnp.broadcast_to(jnp.eye(SK)[:, None], (B, SK, H, SK))
    weights = flash_attention(arrays["q"], arrays["k"], eye, **options)
    return tensor(jnp.moveaxis(weights, 2, 1) > 0)


@pytest.mark.parametrize("scale", [None, 0.1])
def test_sdpa(scale):
    check(functools.partial(sdpa, scale=scale), inputs(0, jnp.float32, **ONE), scale=scale)


def test_sdpa_causal():
    arrays = inputs(1, jnp.float32, **{**ONE, "Sk": SQ})
    check(functools.partial(sdpa, is_causal=True), arrays, causal=True)


def test_sdpa_bottom_right_causal():
    check(functools.partial(sdpa, mask=band(SK, 0)), inputs(2, jnp.float32, **ONE), causal=True)


def test_sdpa_grouped():
    arrays = inputs(3, jnp.float32, **ONE, Hk=2)
    check(functools.partial(sdpa, enable_gqa=True), arrays)


@pytest.mark.parametrize("shape", [(B, H, SQ, SK), (1, H, 1, SK)], ids=str)
def test_sdpa_with_a_bias(shape):
    check(sdpa, inputs(4, jnp.float32, **ONE, bias=shape))


def test_sdpa_with_a_mask():
    mask = booleans(5, B, 1, SQ, SK)
    check(functools.partial(sdpa, mask=tensor(mask)), inputs(6, jnp.float32, **ONE), mask=mask)


@pytest.mark.parametrize("window", [(13, 6), (13, 0), (0, 25)], ids=str)
def test_window_and_lse(window):
    theirs = functools.partial(by_definition, seen=band(*window))
    check(theirs, inputs(7, jnp.float32, **ONE), outputs=2, window=window)


def test_softcap():
    theirs = functools.partial(by_definition, softcap=1.5)
    check(theirs, inputs(8, jnp.float32, **ONE), outputs=2, softcap=1.5)


def test_alibi():
    """Distance is from the query's position, on both sides."""
    m = slopes(9, B, H)
    theirs = functools.partial(by_definition, distance_slopes=tensor(m)[..., None, None] * AHEAD.abs())
    check(theirs, inputs(10, jnp.float32, **ONE), outputs=2, alibi_slopes=m)


def test_sinks():
    theirs = functools.partial(by_definition, seen=band(SK, 0))
    check(theirs, inputs(11, jnp.float32, **ONE, sinks=True), outputs=2, causal=True)


def test_segment_ids():
    q_ids, kv_ids = segments(12, B, SQ, 3), segments(13, B, SK, 3)
    seen = tensor(q_ids)[:, None, :, None] == tensor(kv_ids)[:, None, None, :]
    theirs = functools.partial(by_definition, seen=seen)
    check(theirs, inputs(14, jnp.float32, **ONE), outputs=2, segment_ids=(q_ids, kv_ids))


def test_dropout():
    arrays, options = inputs(15, jnp.float32, **ONE), {"dropout_rate": 0.3, "dropout_key": jax.random.key(16)}
    theirs = functools.partial(by_definition, kept=kept(arrays, options) / 0.7)
    check(theirs, arrays, outputs=2, **options)


def test_order_of_the_features():
    """Scale, softcap, bias and ALiBi, mask, softmax with sink, dropout."""
    arrays = inputs(17, jnp.float32, **ONE, bias=(1, H, SQ, SK), sinks=True)
    mask, m = booleans(18, B, 1, SQ, SK), slopes(19, H)
    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(20)}
    theirs = functools.partial(
        by_definition,
        scale=0.4,
        softcap=2.0,
        distance_slopes=tensor(m)[:, None, None] * AHEAD.abs(),
        seen=tensor(mask) & band(30, 0),
        kept=kept(arrays, options) / 0.7,
    )
    options |= {"scale": 0.4, "softcap": 2.0, "alibi_slopes": m, "mask": mask, "window": (30, 0)}
    check(theirs, arrays, outputs=2, **options)

"""jit, vmap over every argument, checkpoint, scan, jacobians; what has no derivative says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jflash import flash_attention
from tests.oracle import inputs
from tests.parity.cases import booleans, normal, outputs_and_gradients, segments, slopes

N, B, SQ, SK, H = 3, 2, 11, 19, 4
ONE = {"B": B, "Sq": SQ, "Sk": SK, "H": H, "Hk": 2, "D": 8, "Dv": 5}


def attend(arrays: dict, **options):
    """flash_attention of one dict of arrays; the two segment ids under their own names."""
    arrays = dict(arrays)
    ids = arrays.pop("q_ids"), arrays.pop("kv_ids")
    return flash_attention(
        **arrays, segment_ids=ids, dropout_rate=0.3, return_lse=True, implementation="xla", **options
    )


def operands(seed: int) -> dict:
    """Every argument that is an array."""
    return inputs(seed, jnp.float32, **ONE, bias=(1, H, SQ, SK), sinks=True) | {
        "mask": booleans(seed + 1, B, 1, SQ, SK, share=0.9),
        "q_ids": segments(seed + 2, B, SQ, 2),
        "kv_ids": segments(seed + 3, B, SK, 2),
        "alibi_slopes": slopes(seed + 4, H),
        "dropout_key": jax.random.key(seed + 5),
    }


EXAMPLES = [operands(10 * n) for n in range(N)]
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
GROUPS = {
    **{name: (name,) for name in ("q", "k", "v", "bias", "mask", "sinks", "alibi_slopes", "dropout_key")},
    "segment_ids": ("q_ids", "kv_ids"),
    "q_ids": ("q_ids",),
    "everything": tuple(EXAMPLES[0]),
    "all but q, k, v": ("bias", "mask", "q_ids", "kv_ids", "alibi_slopes", "sinks", "dropout_key"),
    "q, k, v": ("q", "k", "v"),
}


def stacked(names) -> dict:
    """The first example's operands, with those named from all of the examples on a new first axis."""
    return {
        name: jnp.stack([example[name] for example in EXAMPLES]) if name in names else x
        for name, x in EXAMPLES[0].items()
    }


def split(arrays: dict) -> tuple[dict, dict]:
    return (
        {name: x for name, x in arrays.items() if name in DIFFERENTIABLE},
        {name: x for name, x in arrays.items() if name not in DIFFERENTIABLE},
    )


@pytest.fixture(scope="module")
def one_by_one():
    """f(i, names): (out, lse) and gradients of the example that has its `names` from example i, compiled once."""

    @jax.jit
    def run(real, other, cotangents):
        results, pull = jax.vjp(lambda real: attend({**real, **other}), real)
        return results, *pull(cotangents)

    def one(i, names, cotangents):
        arrays = {name: EXAMPLES[i if name in names else 0][name] for name in EXAMPLES[0]}
        return run(*split(arrays), cotangents)

    return one


def assert_close(x, y, atol=1e-5):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("group", GROUPS)
def test_vmap_is_a_loop(one_by_one, group):
    """Some arguments mapped, the others shared; a shared argument's gradient is the examples' sum."""
    names = GROUPS[group]
    real, other = split(stacked(names))
    axes = tuple({name: 0 if name in names else None for name in part} for part in (real, other))
    cotangents = normal(50, N, B, SQ, H, 5), normal(51, N, B, H, SQ)

    def mapped(real):
        return jax.vmap(lambda r, o: attend({**r, **o}), axes)(real, other)

    results, grads = outputs_and_gradients(mapped)(real, cotangents)
    loop = [one_by_one(i, names, tuple(ct[i] for ct in cotangents)) for i in range(N)]
    assert_close(results, [jnp.stack(x) for x in zip(*(results for results, _ in loop), strict=True)])
    for name, gradient in grads.items():
        each = jnp.stack([grads[name] for _, grads in loop])
        assert jnp.abs(each).max() > 0.01
        assert_close(gradient, each if name in names else each.sum(axis=0))


def test_vmap_twice():
    """Over two axes of the batch, one of them not the first, gradients mapped outside."""
    q, k, v = normal(0, 2, B, SQ, H, 3, 8), normal(1, 2, B, SK, 2, 8, 3), normal(2, B, SK, 2, 3, 8)
    one = jax.jit(jax.grad(lambda *a: jnp.sin(flash_attention(*a, causal=True)).sum(), argnums=(0, 1, 2)))
    mapped = jax.jit(jax.vmap(jax.vmap(one, (3, 3, 3)), (0, 0, None)))(q, jnp.moveaxis(k, -1, -2), v)
    looped = [[one(q[i, :, :, :, j], k[i, ..., j], v[:, :, :, j]) for j in range(3)] for i in range(2)]
    for n, gradient in enumerate(mapped):
        assert_close(gradient, jnp.stack([jnp.stack([x[n] for x in row]) for row in looped]))


def test_vmap_over_nothing():
    q, k, v = normal(0, 0, B, SQ, H, 8), normal(1, B, SK, 2, 8), normal(2, 0, B, SK, 2, 8)
    out, pull = jax.vjp(jax.vmap(flash_attention, (0, None, 0)), q, k, v)
    assert out.shape == (0, B, SQ, H, 8)
    assert [g.shape for g in pull(out)] == [q.shape, k.shape, v.shape]
    assert not pull(out)[1].any()


def test_jit_is_eager():
    arrays = operands(3)
    assert_close(jax.jit(attend)(arrays), attend(arrays), atol=5e-6)


def test_options_may_be_static_arguments():
    q, k, v = normal(0, B, SQ, H, 8), normal(1, B, SK, 2, 8), normal(2, B, SK, 2, 8)
    jitted = jax.jit(flash_attention, static_argnames=("causal", "window", "scale", "implementation"))
    options = {"causal": True, "window": (5, 0), "scale": 0.5, "implementation": "xla"}
    assert_close(jitted(q, k, v, **options), flash_attention(q, k, v, **options), atol=5e-6)


def test_export_for_any_batch():
    """With a symbolic batch; a symbolic length is for the reference alone."""
    q = normal(3, B, SQ, H, 8)

    def exported(shape, name):
        x = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
        return export.export(jax.jit(lambda q: flash_attention(q, q, q, causal=True, implementation=name)))(x)

    expected = flash_attention(q, q, q, causal=True)
    assert_close(exported(f"b, {SQ}, {H}, 8", None).call(q), expected, atol=5e-6)
    assert_close(exported(f"b, s, {H}, 8", "reference").call(q), expected, atol=5e-6)
    with pytest.raises(NotImplementedError, match="sequence length s is symbolic"):
        exported(f"{B}, s, {H}, 8", None)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_checkpoint(policy):
    """A second forward in the backward: the same gradients, dropout included."""
    real, other = split(operands(4))
    plain = lambda real: attend({**real, **other})  # noqa: E731
    again = jax.checkpoint(plain, policy=policy)
    assert_close(outputs_and_gradients(again)(real), outputs_and_gradients(plain)(real), atol=5e-6)


def test_scan_over_queries():
    """Attention of one block of queries a step, accumulating the gradient of the shared keys."""
    q, k, v = normal(5, 3, B, SQ, H, 8), normal(6, B, SK, 2, 8), normal(7, B, SK, 2, 8)
    attend = functools.partial(flash_attention, softcap=2.0, implementation="xla")

    def scanned(a):
        return jax.lax.scan(lambda c, q: (c + 1, attend(q, a["k"], a["v"])), 0, a["q"])[1]

    def at_once(a):
        out = attend(jnp.moveaxis(a["q"], 0, 1).reshape(B, 3 * SQ, H, 8), a["k"], a["v"])
        return jnp.moveaxis(out.reshape(B, 3, SQ, H, 8), 1, 0)

    arrays = {"q": q, "k": k, "v": v}
    assert_close(outputs_and_gradients(scanned)(arrays), outputs_and_gradients(at_once)(arrays))


@pytest.mark.parametrize("output", [0, 1], ids=["out", "lse"])
def test_jacobian(output):
    """Reverse mode maps the backward over cotangents alone."""
    arrays = inputs(8, jnp.float32, Sq=3, Sk=5, H=2, D=2, bias=(1, 1, 3, 5), sinks=True)

    def jacobian(implementation):
        attend = functools.partial(flash_attention, implementation=implementation, return_lse=True)
        return jax.jit(jax.jacrev(lambda a: attend(**a, causal=True)[output]))(arrays)

    assert_close(jacobian("xla"), jacobian("reference"))


def test_only_the_asked_gradients_are_computed():
    """d_bias is no loop carry unless somebody differentiates the bias."""
    arrays = inputs(9, jnp.float32, Sq=40, H=2, bias=(1, 2, 40, 40))

    def text(names):
        f = lambda a: flash_attention(**arrays | a, implementation="xla").sum()  # noqa: E731
        return jax.jit(jax.grad(f)).lower({name: arrays[name] for name in names}).as_text()

    carry = "tensor<1x2x1x40x40xf32>"
    assert text(("q", "k", "v", "bias")).count(carry) > text(("q", "k", "v")).count(carry)


Q, K, V = normal(0, 1, 3, 2, 4), normal(1, 1, 5, 2, 4), normal(2, 1, 5, 2, 4)
XLA = functools.partial(flash_attention, implementation="xla", causal=True)
REFERENCE = functools.partial(flash_attention, implementation="reference", causal=True)


def test_forward_mode_raises():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(XLA, (Q, K, V), (Q, K, V))


def second(attend):
    """Derivative along q of the gradient of a function that is not linear in out."""
    gradient = jax.grad(lambda q: jnp.sin(attend(q, K, V)).sum())
    return jax.grad(lambda q: jnp.vdot(gradient(q), Q))(Q)


def test_second_derivative_raises_and_says_what_to_do():
    with pytest.raises(NotImplementedError) as raised:
        second(XLA)
    assert str(raised.value) == (
        "the 'xla' backward has no derivative of its own: "
        "pass implementation='reference' for second derivatives and forward mode"
    )


def test_forward_over_reverse_raises():
    gradient = jax.grad(lambda q: jnp.sin(XLA(q, K, V)).sum())
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(gradient, (Q,), (Q,))


def test_reference_has_every_derivative():
    """Forward mode against reverse mode, second derivatives against finite differences in float64."""
    _, tangent = jax.jvp(REFERENCE, (Q, K, V), (Q, K, V))
    out, pull = jax.vjp(XLA, Q, K, V)
    cotangent = normal(3, *out.shape)
    along = sum(jnp.vdot(g, x) for g, x in zip(pull(cotangent), (Q, K, V), strict=True))
    np.testing.assert_allclose(jnp.vdot(cotangent, tangent), along, rtol=1e-5)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x, jnp.float64) for x in (Q, K, V))
        gradient = jax.grad(lambda q: jnp.sin(REFERENCE(q, k, v)).sum())
        slope = (gradient(q + 1e-4 * q) - gradient(q - 1e-4 * q)) / 2e-4
    np.testing.assert_allclose(second(REFERENCE), slope, atol=1e-5)


def test_alibi_slopes_have_no_gradient_and_say_so():
    m = slopes(4, 2)
    loss = lambda m: XLA(Q, K, V, alibi_slopes=m).sum()  # noqa: E731
    with pytest.raises(NotImplementedError) as raised:
        jax.grad(loss)(m)
    assert str(raised.value) == (
        "alibi_slopes has no gradient: wrap it in jax.lax.stop_gradient, or pass the slopes as bias="
    )
    assert not jax.grad(lambda m: loss(jax.lax.stop_gradient(m)))(m).any()

"""The oracle itself against formulas of PyTorch, in float64: cdist, softmax, autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflash import l1_attention
from tests.l1.rule import inputs, normal

torch = pytest.importorskip("torch")

B, S, T, H, D, DV = 2, 9, 13, 3, 7, 4


def torch_distances(q, k):
    """[B, H, Sq, Sk] by cdist, whose gradient at a tie is 0."""
    return torch.cdist(q.transpose(1, 2), k.transpose(1, 2), p=1)


def torch_attention(
    q, k, v, sink=None, bias=None, *, scale=D**-0.5, kind="neg", eps=1e-3, center=False, weight="softmax", hidden=None
):
    d = torch_distances(q, k)
    if center:
        norms = q.abs().sum(-1).transpose(1, 2)[..., None] + k.abs().sum(-1).transpose(1, 2)[:, :, None]
        d = d - norms * 0.5**0.5
    s = -scale * d if kind == "neg" else 1 / (eps + scale * d)
    if bias is not None:
        s = s + bias
    if hidden is not None:
        s = s.masked_fill(hidden, -torch.inf)
    if weight == "softmax":
        if sink is not None:
            column = sink[None, :, None, None].expand(*s.shape[:3], 1)
            s = torch.cat([s, column], dim=-1)
        weights = s.softmax(-1)[..., : k.shape[1]]
    else:
        weights = s.exp() if weight == "exp" else 1 + s.tanh()
    return torch.einsum("bhts,bshw->bthw", weights, v)


CASES = {
    "neg": {},
    "scale": {"scale": 0.3},
    "reciprocal": {"kind": "reciprocal"},
    "reciprocal of the README": {"kind": "reciprocal", "scale": 1.0, "eps": 0.001},
    "reciprocal, large eps": {"kind": "reciprocal", "eps": 2.0, "scale": 0.1},
    "center": {"center": True},
    "exp": {"weight": "exp"},
    "tanh1": {"weight": "tanh1"},
    "tanh1 reciprocal": {"weight": "tanh1", "kind": "reciprocal", "eps": 0.7},
}


def both(arrays: dict, ours: dict, theirs: dict):
    """Outputs and gradients for one random cotangent, of jflash's oracle and of torch."""
    with jax.enable_x64(True):
        wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
        out, pull = jax.vjp(lambda a: l1_attention(**a, **ours, implementation="reference"), wide)
        cotangent = np.random.default_rng(7).normal(size=out.shape)
        found = {"out": out, **pull(jnp.asarray(cotangent))[0]}
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in wide.items()}
    expected = torch_attention(**tensors, **theirs)
    expected.backward(torch.tensor(cotangent))
    return found, {"out": expected.detach(), **{name: x.grad for name, x in tensors.items()}}


def assert_equal(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for name in expected:
        x, y = np.asarray(found[name]), expected[name].numpy()
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11 * max(1, np.abs(y).max()), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_formula(case):
    assert_equal(*both(inputs(0, B=B, Sq=S, Sk=T, H=H, D=D, Dv=DV), CASES[case], CASES[case]))


@pytest.mark.parametrize("kind", ["neg", "reciprocal"])
def test_sink_and_bias(kind):
    arrays = inputs(3, B=B, Sq=S, Sk=T, H=H, D=D, Dv=DV)
    arrays |= {"sink": normal(4, H), "bias": normal(5, B, 1, S, T)}
    assert_equal(*both(arrays, {"kind": kind}, {"kind": kind}))


@pytest.mark.parametrize(
    ("ours", "hidden"),
    [
        ({"causal": True}, lambda i, j: j > i + T - S),
        ({"window": (2, 1)}, lambda i, j: (j < i + T - S - 2) | (j > i + T - S + 1)),
        ({"exclude_diagonal": True}, lambda i, j: j == i + T - S),
        ({"mask": (np.arange(S)[:, None] + np.arange(T)) % 3 > 0}, lambda i, j: (i + j) % 3 == 0),
        (
            {"segment_ids": (np.arange(S)[None].repeat(B, 0) // 4, np.arange(T)[None].repeat(B, 0) // 5)},
            lambda i, j: i // 4 != j // 5,
        ),
    ],
    ids=["causal", "window", "exclude_diagonal", "mask", "segment_ids"],
)
@pytest.mark.parametrize("weight", ["softmax", "exp", "tanh1"])
def test_masks(ours, hidden, weight):
    hidden = torch.tensor(hidden(np.arange(S)[:, None], np.arange(T)))
    arrays = inputs(6, B=B, Sq=S, Sk=T, H=H, D=D, Dv=DV)
    assert_equal(*both(arrays, {**ours, "weight": weight}, {"hidden": hidden, "weight": weight}))


def test_grouped_heads_are_repeated_heads():
    arrays = inputs(8, Sq=S, H=6, Hk=2, D=D)
    repeated = {**arrays, **{name: jnp.repeat(arrays[name], 3, axis=2) for name in ("k", "v")}}
    out, expected = (l1_attention(**a, implementation="reference") for a in (arrays, repeated))
    np.testing.assert_array_equal(out, expected)


def test_lse_is_that_of_the_scores():
    arrays = inputs(9, B=B, Sq=S, Sk=T, H=H, D=D)
    with jax.enable_x64(True):
        wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
        _, lse = l1_attention(**wide, sink=0.5, return_lse=True, implementation="reference")
    s = -torch_distances(*(torch.tensor(wide[name]) for name in "qk")) * D**-0.5
    expected = torch.logaddexp(s.logsumexp(-1), torch.tensor(0.5, dtype=torch.float64))
    np.testing.assert_allclose(lse, expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize("kind", ["neg", "reciprocal"])
def test_sign_of_a_tie_is_0(kind):
    """q equal to k everywhere: jnp.abs would give a gradient of 1."""
    x = normal(10, 1, 1, 1, D)

    def f(q, k):
        return l1_attention(q, k, x, weight="exp", kind=kind, eps=1.0, implementation="reference").sum()

    assert not any(gradient.any() for gradient in jax.grad(f, (0, 1))(x, x))

"""The seed flash-linear-attention-pytorch: the program of its README on our functions, what it prints asserted."""

import pytest

torch = pytest.importorskip("torch")

from interop import flash_linear_attention, normal_linear_attention  # noqa: E402

# (batch, heads, length, dim) of the README and of the tests of its files
README, TESTS = (16, 12, 1024, 64), (16, 8, 1024, 32)


def difference(x, y) -> float:
    return (x - y).abs().max().item()


@pytest.mark.parametrize("shape", [README, TESTS], ids=["readme", "tests"])
def test_readme_program(shape, capsys):
    B, H, L, D = shape
    torch.manual_seed(0)
    Q, K, V = (torch.randn(B, H, L, D, requires_grad=True) for _ in range(3))
    M = torch.randint(0, 2, (1, 1, L, L), dtype=torch.float32)
    with torch.no_grad():
        ours = flash_linear_attention(Q, K, V, M)
        plain = normal_linear_attention(Q[:2], K[:2], V[:2], M)
    print("O_flash.shape", tuple(ours.shape))
    print("O diff", difference(ours[:2], plain))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"O_flash.shape {shape}"
    assert float(printed[1].split()[-1]) < 1e-5 * plain.abs().max()


@pytest.mark.parametrize("mask", [(1, 1, 1024, 1024), (2, 1, 1024, 1024), (2, 4, 1024, 1024)], ids=str)
def test_gradients_of_its_tests(mask):
    """What the seed's own test compares, with a random cotangent: ones would hide a wrong dO."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, 4, 1024, 32, requires_grad=True) for _ in range(3)] + [
        torch.randn(mask, requires_grad=True)
    ]
    cotangent = torch.randn(2, 4, 1024, 32)
    ours, plain = (
        torch.autograd.grad(f(*leaves), leaves, cotangent) for f in (flash_linear_attention, normal_linear_attention)
    )
    for x, y in zip(ours, plain, strict=True):
        assert difference(x, y) < 1e-5 * y.abs().max()


def test_its_advice_for_float16():
    """Normalised queries and keys stay in range, as its README says."""
    torch.manual_seed(0)
    Q, K, V = (torch.randn(1, 2, 2048, 64) for _ in range(3))
    Q, K = (x / x.norm(dim=-1, keepdim=True) for x in (Q, K))
    M = torch.ones(2048, 2048).tril()[None, None]
    half = flash_linear_attention(*(x.half() for x in (Q, K, V, M)))
    assert difference(half.float(), normal_linear_attention(Q, K, V, M)) < 0.1

"""Random inputs, and the same attention by other means: JAX without DLPack, and plain torch operations."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jflash
from tests.oracle import assert_close


def qkv(seed=0, dtype=torch.float32, *, B=2, Sq=21, Sk=None, H=4, Hk=2, D=16, Dv=None, grad=True):
    """Random q, k, v; lengths and head dims are ragged on purpose."""
    g = torch.Generator().manual_seed(seed)
    Sk, Dv = Sk or Sq, Dv or D
    shapes = (B, Sq, H, D), (B, Sk, Hk, D), (B, Sk, Hk, Dv)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_(grad) for shape in shapes]


def cotangent(x: torch.Tensor, seed=99) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


def gradients(outputs, inputs) -> list[torch.Tensor]:
    """Of a random weighting of the outputs."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    weights = [cotangent(x, seed) for seed, x in enumerate(outputs)]
    return list(torch.autograd.grad(outputs, inputs, weights))


def by_jax(tensors, names=(), outputs=2, **options) -> list[torch.Tensor]:
    """out (and lse) and gradients of all tensors under `gradients`' weights, by jflash on copies.

    The tensors are q, k, v and, if there are more, those that `names` names.
    """
    names = ("q", "k", "v", *names)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu), jax.enable_x64(tensors[0].dtype == torch.float64):
        arrays = [_to_jax(x) for x in tensors]

        def f(*arrays):
            both = jflash.flash_attention(**dict(zip(names, arrays, strict=True)), **options, return_lse=True)
            return both[:outputs]

        results, pull = jax.vjp(f, *arrays)
        weights = [_to_jax(cotangent(_to_torch(x), seed)) for seed, x in enumerate(results)]
        return [_to_torch(x) for x in (*results, *pull(tuple(weights)))]


def dropout_key(seed: int) -> jax.Array:
    """The JAX key that the next call draws after `torch.manual_seed(seed)`, which this calls."""
    torch.manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (1, 2), dtype=torch.int32)
    torch.manual_seed(seed)
    return jax.random.wrap_key_data(jnp.asarray(words[0].numpy().view(np.uint32)), impl="threefry2x32")


class Recorded(TorchDispatchMode):
    """Collects the arguments of every call of `jflash::attention_forward`."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.jflash.attention_forward.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def by_definition(q, k, v, *, scale=None, left=-1, right=-1, softcap=0.0, alibi_slopes=None):
    """out and lse as their formulas, with the positions of `flash_attn_func`."""
    (Sq, H, D), (Sk, Hk) = q.shape[1:], k.shape[1:3]
    k, v = (x.repeat_interleave(H // Hk, dim=2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(Sq)[:, None] + Sk - Sq - torch.arange(Sk)  # of a key before its query
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[:, None, None] * distance.abs()
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    s = s.masked_fill(~seen, -torch.inf)
    p = torch.where(seen.any(-1, keepdim=True), s, 0).softmax(-1) * seen
    return torch.einsum("bhij,bjhd->bihd", p, v), s.logsumexp(-1)


def assert_follows(names, ours, low, ref, dtype) -> None:
    """Every array within the rule of `tests.oracle`: as near to `ref` as `low`, the formula in our dtype."""
    for name, x, lo, r in zip(names, ours, low, ref, strict=True):
        assert not r.isnan().any(), f"{name}: the reference is not a number"
        arrays = (y.detach().double().numpy() for y in (x, lo, r))
        assert_close(name, *arrays, jnp.dtype(str(dtype).removeprefix("torch.")))


def _to_jax(x: torch.Tensor) -> jax.Array:
    x = x.detach()
    return jnp.asarray(x.float().numpy(), jnp.bfloat16) if x.dtype == torch.bfloat16 else jnp.asarray(x.numpy())


def _to_torch(x: jax.Array) -> torch.Tensor:
    if x.dtype == jnp.bfloat16:
        return torch.tensor(np.asarray(x, np.float32)).bfloat16()
    return torch.tensor(np.asarray(x))

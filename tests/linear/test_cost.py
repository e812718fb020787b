"""What it costs: memory that grows with N, nothing of N x N but the mask, and time far below the quadratic form's."""

import time

import jax
import jax.numpy as jnp
import pytest

from jflash import linear_attention


def training(**options):
    """A jitted forward and backward of q, k, v and every array among the options."""

    def run(arrays, cotangent):
        out, pull = jax.vjp(lambda a: linear_attention(**a, implementation="xla", **options), arrays)
        return out, pull(cotangent)

    return jax.jit(run)


def qkv(S: int, H=1, D=64, B=1) -> dict:
    return dict(zip("qkv", jax.random.normal(jax.random.key(0), (3, B, S, H, D)), strict=True))


def temporary_bytes(arrays: dict, **options) -> int:
    compiled = training(**options).lower(arrays, arrays["v"]).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("decay", [None, "token"])
def test_memory_grows_with_length(decay):
    def bytes_at(S):
        g = {} if decay is None else {"log_decay": -jnp.ones((2,) if decay == "head" else (1, S, 2))}
        return temporary_bytes(qkv(S, H=2) | g)

    small, large = bytes_at(4096), bytes_at(16384)
    assert large < 4.5 * small
    assert large < 16384**2 * 4 / 8  # an eighth of one head's weights


@pytest.mark.parametrize("S", [1024, 1000])
def test_a_broadcast_mask_has_no_full_buffer(S):
    """32 batch entries and heads share one mask, its gradient is found without their 32 weight matrices."""
    B, H = 4, 8
    arrays = qkv(S, H=H, B=B, D=16) | {"mask": jnp.ones((1, 1, S, S))}
    assert temporary_bytes(arrays) < B * H * S * S * 4 / 3


@pytest.mark.slow  # it times: two tests side by side disturb it
def test_three_times_faster_than_quadratic():
    S = 8192
    arrays = qkv(S) | {"log_decay": -jnp.asarray([0.01])}

    @jax.jit
    def quadratic(arrays, cotangent):
        i, j = jnp.arange(S)[:, None], jnp.arange(S)

        def attend(a):
            decay = jnp.where(i >= j, jnp.exp((i - j) * a["log_decay"][:, None, None]), 0)
            weights = jnp.einsum("bihd,bjhd->bhij", a["q"], a["k"]) * decay * 0.125
            return jnp.einsum("bhij,bjhd->bihd", weights, a["v"])

        out, pull = jax.vjp(attend, arrays)
        return out, pull(cotangent)

    cotangent = arrays["v"][..., ::-1]
    candidates = {"ours": training(), "quadratic": quadratic}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(2):
        for name, run in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(run(arrays, cotangent))
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = (min(found) for found in seconds.values())
    assert theirs > 3 * ours, f"{theirs:.3f} s against {ours:.3f} s"

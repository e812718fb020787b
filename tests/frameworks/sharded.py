"""Four CPU devices: run by test_transforms.py in a process of its own, whose XLA_FLAGS make them."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jflash import flash_attention

B, S, H, Hk, D = 4, 40, 8, 4, 16
SPECS = {
    "batch": P("x", None, None, None),
    "heads": P(None, None, "x", None),
    "batch and heads": P("x", None, "y", None),
}


def gradients(q, k, v, mask, d_out):
    out, pull = jax.vjp(lambda q, k, v: flash_attention(q, k, v, causal=True, mask=mask), q, k, v)
    return out, *pull(d_out)


def main():
    devices = np.array(jax.devices())
    assert devices.size == 4, devices
    rng = np.random.default_rng(0)
    shapes = ((B, S, H, D), (B, S, Hk, D), (B, S, Hk, D))
    q, k, v, d_out = (rng.normal(size=shape).astype(np.float32) for shape in (*shapes, shapes[0]))
    mask = rng.random((B, 1, 1, S)) > 0.3
    alone = jax.jit(gradients)(q, k, v, mask, d_out)
    for name, spec in SPECS.items():
        mesh = Mesh(devices.reshape(2, 2), ("x", "y")) if "y" in spec else Mesh(devices, ("x",))
        over, replicated = NamedSharding(mesh, spec), NamedSharding(mesh, P())
        run = jax.jit(gradients, in_shardings=(over, over, over, replicated, over), out_shardings=over)
        found = run(q, k, v, mask, d_out)
        for one, many in zip(alone, found, strict=True):
            assert many.sharding.is_equivalent_to(over, 4), name
            assert np.abs(np.asarray(one) - np.asarray(many)).max() < 1e-5, name
        print(f"{name}: equal")


if __name__ == "__main__":
    main()

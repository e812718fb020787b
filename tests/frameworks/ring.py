"""ring_attention over four CPU devices: run by test_sharded.py in a process of its own, whose XLA_FLAGS make them."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jflash.parallel import ring_attention, zigzag_order
from tests import oracle

CASES = {
    "causal": ((4,), {"causal": True}, {"Sq": 48, "H": 4, "Hk": 2}, jnp.float32),
    "full": ((4,), {"softcap": 3.0}, {"Sq": 20, "Sk": 32, "Dv": 8}, jnp.float32),
    "bfloat16": ((2,), {"causal": True, "scale": 0.5}, {"Sq": 64, "B": 2}, jnp.bfloat16),
    "zigzag": ((4,), {"causal": True}, {"Sq": 48, "H": 4, "Hk": 2}, jnp.float32),
    "one device": ((1,), {"causal": True}, {"Sq": 16}, jnp.float32),
    "batch too": ((2, 2), {"causal": True}, {"Sq": 32, "B": 2, "H": 4, "Hk": 1}, jnp.float32),
}


def main(*chosen: str):
    for seed, name in enumerate(chosen):
        shape, options, sizes, dtype = CASES[name]
        mesh = jax.make_mesh(shape, ("s", "b")[: len(shape)], (AxisType.Auto,) * len(shape))
        rows = P("b" if len(shape) > 1 else None, "s")
        lse = P(rows[0], None, "s")

        def attend(q, k, v, mesh=mesh, specs=(rows, lse), zigzag=name == "zigzag", **options):
            ring = functools.partial(ring_attention, axis_name="s", zigzag=zigzag, **options)
            split = jax.shard_map(ring, mesh=mesh, in_specs=(specs[0],) * 3, out_specs=specs)
            if not zigzag:
                return split(q, k, v)
            order = zigzag_order(q.shape[1], 4)
            out, lse = split(*(x[:, order] for x in (q, k, v)))
            return out[:, order.argsort()], lse[:, :, order.argsort()]

        oracle.assert_matches_oracle(oracle.inputs(seed, dtype, D=16, **sizes), options, "xla", attend)
        print(f"{name}: equal")


if __name__ == "__main__":
    main(*sys.argv[1:])

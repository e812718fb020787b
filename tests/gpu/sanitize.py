"""A small call of each attention kernel, to run under compute-sanitizer; see docs/development.md."""

from typing import Any

import jax
import jax.numpy as jnp

from jflash import flash_attention

for head_dim, length in ((64, 200), (128, 256), (256, 150)):
    q, k, v = (jax.random.normal(jax.random.key(n), (1, length, 2, head_dim), jnp.bfloat16) for n in range(3))
    i = jnp.arange(length)
    features: tuple[dict[str, Any], ...] = (
        {"causal": True},
        {"softcap": 20.0},
        {"causal": True, "deterministic": True},
        {"dropout_rate": 0.5, "dropout_key": jax.random.key(3)},
        {"mask": (i // 50 == i[:, None] // 50)[None, None], "bias": jnp.sin(i + i[:, None])[None, None]},
        {"segment_ids": i[None] // 70, "bias": jnp.sin(i)[None, None, None]},
    )
    for options in features:

        def attend(q, k, v, bias, options=options):
            return flash_attention(q, k, v, **{**options, "bias": bias}, implementation="hopper")

        out, pull = jax.vjp(attend, q, k, v, options.get("bias"))
        found = [float(jnp.abs(x).max()) for x in (out, *jax.tree.leaves(pull(out)))]
        print(head_dim, [*options], found, flush=True)

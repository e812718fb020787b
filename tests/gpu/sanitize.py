"""A small call of each attention kernel, to run under compute-sanitizer; see docs/development.md."""

import jax
import jax.numpy as jnp

from jflash import flash_attention

for head_dim, length in ((64, 200), (128, 256), (256, 150)):
    q, k, v = (jax.random.normal(jax.random.key(n), (1, length, 2, head_dim), jnp.bfloat16) for n in range(3))
    for options in ({"causal": True}, {"softcap": 20.0}):
        out, pull = jax.vjp(lambda *a, o=options: flash_attention(*a, **o, implementation="hopper"), q, k, v)
        print(head_dim, options, [float(jnp.abs(x).max()) for x in (out, *pull(out))], flush=True)

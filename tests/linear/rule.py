"""The rule of `tests.oracle` for linear attention: out, the state, and the gradient of every array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jflash import LinearAttentionState, linear_attention
from tests.oracle import assert_close, on_the_cpu

DECAYS = (None, "head", "token")


def inputs(
    seed=0, dtype=jnp.float32, *, B=2, S=50, Sk=None, Hq=2, Hk=None, Hv=None, D=8, Dv=None, N=None, decay=None,
    strength=1.0, mask=None, state=False, positive=False,
) -> dict:  # fmt: skip
    """Random arguments of `linear_attention`: N states, log decays of about -strength, positive q and k if asked."""
    rng = np.random.default_rng(seed)
    Hk, Dv = Hk or Hq, Dv or D
    Hv = Hv or Hk
    H = max(Hq, Hk, Hv)
    wide = jnp.promote_types(dtype, jnp.float32)
    with jax.enable_x64(dtype == jnp.float64):
        normal = lambda *shape, dtype=dtype: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
        found: dict = {"q": normal(B, S, Hq, D), "k": normal(B, Sk or S, Hk, D), "v": normal(B, Sk or S, Hv, Dv)}
        if positive:
            found |= {name: jnp.abs(found[name]) for name in ("q", "k")}
        if decay is not None:
            shape = (H,) if decay == "head" else (B, S, H)
            found["log_decay"] = -strength * jnp.abs(normal(*shape, dtype=wide))
        if mask is not None:
            found["mask"] = normal(*mask)
        if state:
            z = jnp.abs(normal(N or B, H, D, dtype=wide)) if positive else None
            found["initial_state"] = LinearAttentionState(normal(N or B, H, D, Dv, dtype=wide), z)
    return found


def assert_matches_oracle(arrays: dict, implementation="xla", attend=linear_attention, **options) -> None:
    """Holds every result and every gradient of `attend` to the rule, with random cotangents."""
    dtype = arrays["q"].dtype
    with jax.enable_x64(dtype == jnp.float64):
        ours = everything(attend, arrays, implementation=implementation, **options)
        with on_the_cpu():
            here = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), arrays)
            low = everything(linear_attention, here, implementation="reference", **options)
    ref = exact(arrays, **options)
    assert ours.keys() == ref.keys()
    for name in ref:
        assert ours[name].dtype == low[name].dtype, f"{name}: {ours[name].dtype}, oracle {low[name].dtype}"
        assert_close(name, ours[name], low[name], ref[name], dtype)


def exact(arrays: dict, **options) -> dict:
    """`everything` of the oracle in float64."""
    with jax.enable_x64(True), on_the_cpu():
        wide = jax.tree.map(lambda x: x if x.dtype == bool else jnp.asarray(np.asarray(x, np.float64)), arrays)
        options = {name: np.asarray(x) if isinstance(x, jax.Array) else x for name, x in options.items()}
        return everything(linear_attention, wide, implementation="reference", **options)


def everything(attend, arrays: dict, **options) -> dict:
    """The results by name, a causal call with its state, and the gradient of each floating array: dq, dk and so on."""
    causal = options.get("causal", "mask" not in arrays)
    options.setdefault("return_state", bool(causal))

    def run(arrays):
        fixed = {name: x for name, x in arrays.items() if name == "mask" and x.dtype == bool}
        moving = {name: x for name, x in arrays.items() if name not in fixed}
        results, pull = jax.vjp(lambda moving: attend(**fixed, **moving, **options), moving)
        rng = np.random.default_rng(99)
        cotangents = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), results)
        return results, pull(cotangents)[0]

    results, grads = jax.jit(run)(arrays)
    results = {"out": results[0], **_named(results[1])} if options["return_state"] else {"out": results}
    grads = {f"d{name}": x for name, x in (grads | _named(grads.pop("initial_state", None))).items()}
    return results | grads


def _named(state: LinearAttentionState | None) -> dict:
    return {} if state is None else {name: x for name, x in state._asdict().items() if x is not None}

"""The correctness rule: how far a result may be from the float64 oracle.

`ref` is the oracle in float64 on the same inputs, `lo` the oracle in the inputs' own dtype. With x ours,
    max|x - ref| <= 2 max|lo - ref| + atol    and    rms(x - ref) <= 1.5 rms(lo - ref) + atol
for every output and gradient, where atol is twice one rounding of ref + 0.3 in the inputs' dtype, and 32
roundings of the largest ref in the dtype of the statistics. In 16 bits these are nothing; float64 has no wider
oracle; and a float32 backward starts from the saved lse, whose rounding is an error of every weight in its row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jflash import flash_attention


def inputs(seed, dtype, *, B=1, Sq=64, Sk=None, H=2, Hk=None, D=32, Dv=None, bias=None, sinks=False) -> dict:
    """Random q, k, v in a dtype, with a bias of the given shape and sinks if asked."""
    rng = np.random.default_rng(seed)
    Sk, Hk, Dv = (Sq if Sk is None else Sk), Hk or H, Dv or D
    found = {"q": rng.normal(size=(B, Sq, H, D)), "k": rng.normal(size=(B, Sk, Hk, D))}
    found["v"] = rng.normal(size=(B, Sk, Hk, Dv))
    if bias is not None:
        found["bias"] = rng.normal(size=bias)
    if sinks:
        found["sinks"] = rng.normal(size=H)
    with jax.enable_x64(dtype == jnp.float64):
        return {name: jnp.asarray(x, dtype) for name, x in found.items()}


def assert_matches_oracle(
    arrays: dict, options: dict, implementation: str | None = None, attend=flash_attention, strict=False
):
    """Holds out, lse and every gradient of `attend` to the rule, with random cotangents for both outputs."""
    dtype = arrays["q"].dtype
    cotangents = _cotangents(arrays)
    with jax.enable_x64(dtype == jnp.float64):
        ours = _everything(attend, arrays, cotangents, {**options, "implementation": implementation})
        low = _oracle(arrays, cotangents, options)
    with jax.enable_x64(True):
        ref = _oracle({name: np.asarray(x, np.float64) for name, x in arrays.items()}, cotangents, options)
    for name in ref:
        assert ours[name].dtype == low[name].dtype, f"{name}: {ours[name].dtype}, oracle {low[name].dtype}"
        assert_close(name, ours[name], low[name], ref[name], dtype, strict)


def assert_close(name: str, x, low, ref, dtype, strict=False) -> None:
    """The rule for one array; `strict` grants the rms of an array of some size no atol."""
    x, low, ref = (np.asarray(y, np.float64) for y in (x, low, ref))
    assert x.shape == ref.shape, f"{name}: shape {x.shape}, oracle {ref.shape}"
    assert np.array_equal(np.isneginf(x), np.isneginf(ref)), f"{name}: -inf in other places than the oracle"
    assert np.array_equal(np.isnan(x), np.isnan(ref)), f"{name}: NaN in other places than the oracle"
    finite = np.isfinite(ref)
    x, low, ref = x[finite], low[finite], ref[finite]
    if x.size == 0:
        return
    assert np.isfinite(x).all(), f"{name}: {np.sum(~np.isfinite(x))} of {x.size} values are not finite"
    atol = _tolerance(ref, dtype)
    worst, allowed = np.abs(x - ref).max(), 2 * np.abs(low - ref).max() + atol
    assert worst <= allowed, f"{name}: max error {worst:.3g} > {allowed:.3g}"
    rms, allowed = _rms(x - ref), 1.5 * _rms(low - ref) + (0 if strict and x.size > 100 else atol)
    assert rms <= allowed, f"{name}: rms error {rms:.3g} > {allowed:.3g}"


def _tolerance(ref: np.ndarray, dtype) -> float:
    with jax.enable_x64(dtype == jnp.float64):
        shift = jnp.asarray(0.3, dtype)
        rounded = np.asarray(jnp.asarray(ref, dtype) + shift - shift, np.float64)
    wide = jnp.promote_types(dtype, jnp.float32)
    return 2 * np.abs(rounded - ref).max() + 32 * float(jnp.finfo(wide).eps) * np.abs(ref).max()


def _rms(x: np.ndarray) -> float:
    return np.sqrt(np.mean(np.square(x)))


def _cotangents(arrays: dict):
    rng = np.random.default_rng(99)
    B, Sq, H, _ = arrays["q"].shape
    return rng.normal(size=(B, Sq, H, arrays["v"].shape[-1])), rng.normal(size=(B, H, Sq))


def on_the_cpu():
    """The oracle runs on the CPU, where a GPU would spend minutes tuning its float64 products."""
    return jax.default_device(jax.devices("cpu")[0])


def _oracle(arrays: dict, cotangents, options: dict) -> dict:
    with on_the_cpu():
        arrays = {name: jnp.asarray(np.asarray(x)) for name, x in arrays.items()}
        options = {name: _in_dtype_of(arrays["q"], x) for name, x in options.items()}
        return _everything(flash_attention, arrays, cotangents, {**options, "implementation": "reference"})


def _everything(attend, arrays: dict, cotangents, options: dict) -> dict:
    """out, lse and the gradient of each differentiable array."""

    def run(arrays, cotangents):
        def f(arrays):
            return attend(**arrays, **options, return_lse=True)

        (out, lse), pull = jax.vjp(f, arrays)
        d_out, d_lse = cotangents
        # A row that sees no key has an lse of -inf, and no gradient whatever its cotangent.
        (grads,) = pull((jnp.asarray(d_out, out.dtype), jnp.asarray(d_lse, lse.dtype)))
        return out, lse, grads

    out, lse, grads = jax.jit(run, compiler_options=_compiled_for_one_run())(arrays, cotangents)
    return {"out": out, "lse": lse, **{f"d{name}": g for name, g in grads.items()}}


def _compiled_for_one_run() -> dict | None:
    """A CPU compiles in half the time so; a GPU must run what users run."""
    device = jax.config.jax_default_device or jax.devices()[0]
    return {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None


def _in_dtype_of(q, x):
    """An option for the oracle: float64 beside a float64 q."""
    floating = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.asarray(np.asarray(x, np.float64)) if floating and q.dtype == jnp.float64 else x

"""Draws time and peak memory against sequence length: jflash, naive attention and torch SDPA, on this CPU.

    python -m examples.attention_plot

Each point is a training step of attention (forward and backward, causal, float32) in a process of its own, so
that no implementation pays for what another left in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

B, H, D = 1, 4, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
NAIVE_LIMIT = 2e9  # bytes of score matrices above which naive attention is left out
COLORS = {"jflash": "#d1495b", "naive jnp": "#8d99ae", "torch SDPA": "#3d405b"}


def jflash_step(length: int) -> Callable[[], object]:
    import jflash

    return _jax_step(lambda q, k, v: jflash.flash_attention(q, k, v, causal=True), length)


def naive_step(length: int) -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    def attend(q, k, v):
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
        scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
        return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), v)

    return _jax_step(attend, length)


def torch_step(length: int) -> Callable[[], object]:
    import torch

    shape = (B, H, length, D)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(shape)

    def step():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(out, (q, k, v), cotangent)

    return step


def _jax_step(attend: Callable, length: int) -> Callable[[], object]:
    """Compiled before it is measured: a compiler's memory is not attention's."""
    import jax

    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, B, length, H, D))
    step = jax.jit(lambda q, k, v, ct: jax.vjp(attend, q, k, v)[1](ct)).lower(q, k, v, cotangent).compile()
    return lambda: jax.block_until_ready(step(q, k, v, cotangent))


STEPS = {"jflash": jflash_step, "naive jnp": naive_step, "torch SDPA": torch_step}


def measure(name: str, length: int) -> dict[str, float]:
    """The fastest step in milliseconds, and the memory one held above its inputs (Linux tells; else NaN)."""
    step = STEPS[name](length)
    before = _reset_peak()
    step()
    peak_mb = (_status("VmHWM") - before) / 1e6
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.5:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"ms": 1e3 * min(times), "peak_mb": peak_mb}


def _reset_peak() -> float:
    """Starts the process's high-water mark afresh; returns the bytes resident now."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _status("VmRSS")


def _status(field: str) -> float:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(field)), float("nan"))


def measure_apart(name: str, length: int) -> dict[str, float]:
    """`measure` in a new process."""
    command = [sys.executable, "-m", "examples.attention_plot", "--point", name, str(length)]
    run = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True)
    point = json.loads(run.stdout)
    print(f"{name:<10} S {length:5d}  {point['ms']:8.1f} ms  {point['peak_mb']:7.0f} MB", flush=True)
    return point


def lengths_for(name: str, lengths: list[int]) -> list[int]:
    """Naive attention holds about six score matrices; it stops where they would fill a laptop."""
    if name != "naive jnp":
        return lengths
    return [length for length in lengths if 6 * 4 * B * H * length**2 <= NAIVE_LIMIT]


def draw(points: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, field, title in zip(
        panels, ("ms", "peak_mb"), ("time (ms)", "peak memory above inputs (MB)"), strict=True
    ):
        for name, found in points.items():
            width = 2.5 if name == "jflash" else 1.5
            axes.plot(
                list(found),
                [p[field] for p in found.values()],
                "o-",
                label=name,
                color=COLORS[name],
                lw=width,
            )
        axes.set(xscale="log", yscale="log", xlabel="sequence length", title=title)
        lengths = sorted({length for found in points.values() for length in found})
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(f"Causal attention, forward and backward, CPU, float32, B{B} H{H} D{D}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of attention against sequence length.")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="sequence lengths [512 to 8192]")
    parser.add_argument("--out", type=Path, default=Path("out/attention.png"), help="the PNG [out/attention.png]")
    parser.add_argument("--point", nargs=2, metavar=("NAME", "LENGTH"), help="measure one point here, print JSON")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(args.point[0], int(args.point[1]))))
        return
    points = {name: {s: measure_apart(name, s) for s in lengths_for(name, args.lengths)} for name in STEPS}
    draw(points, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

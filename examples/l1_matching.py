"""Trains a small transformer to match two equal symbols among others, with L1 and with dot-product attention.

    python -m examples.l1_matching

Eight tokens each carry a random symbol and a random position; two of the symbols are equal. The answer is how far
apart those two are. It is the matching task of github.com/tlh24/l1-attention, made to run in a minute on a CPU:
every kind of score gets the same model, data, learning rate and seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import jflash

console = Console(highlight=False)
SYMBOL = 10  # features of a symbol; a position has four
AVERAGED = 100  # steps a reported loss is the mean of
COLORS = ("#d1495b", "#edae49", "#8d99ae", "#3d405b")


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of the model, of an example and of a batch."""

    tokens: int = 8
    layers: int = 2
    heads: int = 4
    width: int = 32
    batch: int = 64
    learning_rate: float = 2e-3
    clip: float = 1.0


def dot_product(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jflash.flash_attention(q, k, v, mask=~jnp.eye(q.shape[1], dtype=bool))


def l1(**options) -> Callable:
    return functools.partial(jflash.l1_attention, exclude_diagonal=True, **options)


ATTENTION = {
    "L1, 1 / (eps + distance)": l1(kind="reciprocal"),
    "L1, -distance and a sink": l1(sink=0.0),
    "L1, -distance": l1(),
    "dot product": dot_product,
}


def draw(config: Config, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A batch of tokens [B, N, 14] and the distances [B] of the positions whose symbols are equal."""
    symbols, positions, pairs = jax.random.split(key, 3)
    B, N = config.batch, config.tokens
    symbol = jax.random.normal(symbols, (B, N, SYMBOL)) / 2
    position = jax.random.randint(positions, (B, N), 0, 128) / 16
    i, j = jax.vmap(lambda key: jax.random.choice(key, N, (2,), replace=False))(jax.random.split(pairs, B)).T
    row = jnp.arange(B)
    symbol = symbol.at[row, j].set(symbol[row, i])
    coarser = position[..., None] / jnp.asarray([1, 4, 16, 64])
    return jnp.concatenate([symbol, coarser], axis=-1), jnp.abs(position[row, i] - position[row, j])


def parameters(config: Config, key: jax.Array) -> dict:
    keys = iter(jax.random.split(key, 2 + 4 * config.layers))
    E = config.width

    def linear(n: int, m: int) -> dict:
        """Uniform in +-1 / sqrt(n), as torch.nn.Linear starts."""
        x = jax.random.uniform(next(keys), (n + 1, m), minval=-1, maxval=1) / n**0.5
        return {"w": x[:n], "b": x[n]}

    blocks = [
        {"qkv": linear(E, 3 * E), "out": linear(E, E), "up": linear(E, 4 * E), "down": linear(4 * E, E)}
        for _ in range(config.layers)
    ]
    return {"embed": linear(SYMBOL + 4, E), "blocks": blocks, "answer": linear(E, 1)}


def apply(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"]


def quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def predict(params: dict, tokens: jax.Array, attend: Callable, heads: int) -> jax.Array:
    """[B, N, 14] -> [B]: blocks without normalisation, the answer summed over the tokens."""
    x = quick_gelu(apply(params["embed"], tokens))
    for block in params["blocks"]:
        q, k, v = jnp.unstack(apply(block["qkv"], x).reshape(*x.shape[:2], 3, heads, -1), axis=2)
        x = x + apply(block["out"], attend(q, k, v).reshape(x.shape))
        x = x + apply(block["down"], quick_gelu(apply(block["up"], x)))
    return apply(params["answer"], x).sum(axis=(1, 2))


def train(name: str, seed: int, steps: int, config: Config = Config()) -> list[float]:
    """The losses of a run, each the mean over `AVERAGED` steps."""
    start, data = jax.random.split(jax.random.key(seed))
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(config.learning_rate))

    def loss(params, key):
        tokens, distance = draw(config, key)
        return jnp.mean((predict(params, tokens, ATTENTION[name], config.heads) - distance) ** 2)

    def step(state, n):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, jax.random.fold_in(data, n))
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    params = parameters(config, start)
    state = params, optimizer.init(params)
    run = jax.jit(lambda state, first: jax.lax.scan(step, state, first + jnp.arange(AVERAGED)))
    losses = []
    for first in range(0, steps, AVERAGED):
        state, values = run(state, first)
        losses.append(float(values.mean()))
    return losses


def draw_plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, runs), color in zip(curves.items(), COLORS, strict=True):
        for n, losses in enumerate(runs):
            steps = [AVERAGED * (i + 1) for i in range(len(losses))]
            axes.plot(steps, losses, color=color, label=name if n == 0 else None)
    axes.axhline(0.1, color="black", lw=0.8, ls=":")
    axes.set(yscale="log", xlabel="step", ylabel=f"squared error, mean of {AVERAGED} steps")
    axes.set_title("Matching two equal symbols", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Matching two equal symbols: L1 against dot-product attention.")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("out/l1_matching.png"), help="the plot [out/l1_matching.png]")
    args = parser.parse_args()
    curves = {}
    for name in ATTENTION:
        begin = time.perf_counter()
        curves[name] = [train(name, seed, args.steps) for seed in args.seeds]
        last = ", ".join(f"{losses[-1]:.3f}" for losses in curves[name])
        console.print(f"{name:<26} loss {last} after {args.steps} steps, {time.perf_counter() - begin:.0f} s")
    draw_plot(curves, args.out)
    console.print(_table(curves))
    console.print(f"wrote {args.out}")


def _table(curves: dict[str, list[list[float]]]) -> Table:
    length = len(next(iter(curves.values()))[0])
    marks = sorted({max(1, length * part // 5) for part in (1, 2, 3, 4, 5)})
    table = Table(title="squared error; guessing the mean gives 3.6", title_justify="left")
    table.add_column("scores")
    for n in marks:
        table.add_column(f"step {AVERAGED * n}", justify="right")
    for name, runs in curves.items():
        table.add_row(name, *(" ".join(f"{losses[n - 1]:.3f}" for losses in runs) for n in marks))
    return table


if __name__ == "__main__":
    main()

"""Trains a small Flax transformer on real text, samples from it, and runs its attention in PyTorch.

    python -m examples.train_text

The text is the standard library's help pages, read byte by byte. Attention is `jflash.flash_attention` under
`nnx.jit`; the last lines run one trained attention layer in PyTorch, on the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import jflash
from interop import flash_attn_func

console = Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of the model and of a batch; a token is a byte."""

    layers: int = 4
    width: int = 128
    heads: int = 2
    context: int = 256
    batch: int = 8
    vocabulary: int = 256


def alibi_slopes(heads: int) -> np.ndarray:
    """How fast a head's view fades with distance: one head looks at its neighbours, one nearly everywhere."""
    return np.exp2(-np.linspace(1, 8, heads)).astype(np.float32)


class Attention(nnx.Module):
    """Causal self-attention; positions enter through ALiBi, so there is no position embedding."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = nnx.Linear(config.width, 3 * config.width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(config.width, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        B, S, width = x.shape
        q, k, v = jnp.unstack(self.qkv(x).reshape(B, S, 3, self.heads, -1), axis=2)
        slopes = jnp.asarray(alibi_slopes(self.heads))
        mixed = jflash.flash_attention(q, k, v, causal=True, alibi_slopes=slopes)
        return self.out(mixed.reshape(B, S, width))


class Block(nnx.Module):
    """Attention, then a two-layer network; each reads a normalised copy of the stream and adds to it."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.norm1 = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.norm2 = nnx.RMSNorm(config.width, rngs=rngs)
        self.up = nnx.Linear(config.width, 4 * config.width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * config.width, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """Tokens [B, S] in, logits of each next token [B, S, vocabulary] out."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.logits = nnx.Linear(config.width, config.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """The help pages as bytes: nine tenths to train on, one tenth to validate on."""
    from pydoc_data.topics import topics

    text = np.frombuffer("\n\n".join(topics.values()).encode(), np.uint8)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def draw(text: np.ndarray, config: Config, rng: np.random.Generator) -> jax.Array:
    """A batch of random windows, one token longer than the context."""
    starts = rng.integers(0, len(text) - config.context, size=(config.batch, 1))
    return jnp.asarray(text[starts + np.arange(config.context + 1)], jnp.int32)


def loss_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats, of each token given those before it."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


evaluate = nnx.jit(loss_of)


@nnx.jit
def train_step(model: Decoder, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, gradients)
    return loss


def train(config: Config, steps: int, seed: int) -> tuple[Decoder, list[float]]:
    """Trains a new model; also returns the validation losses: before the first step, then about ten times."""
    training, validation = read_text()
    rng = np.random.default_rng(seed)
    held_out = [draw(validation, config, rng) for _ in range(8)]
    model = Decoder(config, nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 6e-3, steps // 10, steps, 3e-4)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=0.1), wrt=nnx.Param)
    losses: list[float] = []
    times: list[float] = []

    def validate(step: int) -> None:
        losses.append(float(np.mean([evaluate(model, tokens) for tokens in held_out])))
        console.print(f"step {step:4d}  validation loss {losses[-1]:.3f}")

    columns = (
        BarColumn(),
        TextColumn("step {task.completed}/{task.total} {task.description}"),
        TimeElapsedColumn(),
    )
    validate(0)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps)
        for step in range(1, steps + 1):
            start = time.perf_counter()
            loss = float(train_step(model, optimizer, draw(training, config, rng)))
            times.append(time.perf_counter() - start)
            speed = config.batch * config.context / statistics.median(times)
            progress.update(bar, advance=1, description=f"loss {loss:.3f}  {speed:,.0f} tokens/s")
            if step % max(1, steps // 10) == 0:
                validate(step)
    return model, losses


@functools.partial(nnx.jit, static_argnames="length")
def sample(model: Decoder, prompt: jax.Array, key: jax.Array, length: int) -> jax.Array:
    """`length` tokens that go on from the prompt, each drawn at temperature 0.7; the window slides along."""

    def next_token(window, key):
        token = jax.random.categorical(key, model(window[None])[0, -1] / 0.7)
        return jnp.append(window[1:], token), token

    return jax.lax.scan(next_token, prompt, jax.random.split(key, length))[1]


def layer_in_jax(layer: Attention, x: jax.Array, cotangent: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The layer's output, and the gradient of its input."""
    out, pull = jax.vjp(layer, x)
    return np.asarray(out), np.asarray(pull(cotangent)[0])


def layer_in_torch(layer: Attention, x: jax.Array, cotangent: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The same from PyTorch, on the same weights: autograd through `interop.flash_attn_func`."""

    def tensor(array) -> torch.Tensor:
        return torch.tensor(np.asarray(array), device="cuda" if torch.cuda.is_available() else "cpu")

    B, S, width = x.shape
    stream = tensor(x).requires_grad_()
    q, k, v = (stream @ tensor(layer.qkv.kernel[...])).view(B, S, 3, layer.heads, -1).unbind(2)
    mixed = flash_attn_func(q, k, v, causal=True, alibi_slopes=tensor(alibi_slopes(layer.heads)))
    mixed = mixed.reshape(B, S, width)
    out = mixed @ tensor(layer.out.kernel[...])
    (gradient,) = torch.autograd.grad(out, stream, tensor(cotangent))
    return out.detach().cpu().numpy(), gradient.cpu().numpy()


def compare_with_torch(model: Decoder, tokens: jax.Array) -> tuple[float, float]:
    """How far the first layer in PyTorch is from JAX at most: its output, and its input's gradient."""
    block = model.blocks[0]
    x = block.norm1(model.embed(tokens))
    cotangent = jax.random.normal(jax.random.key(1), x.shape)
    out, gradient = layer_in_jax(block.attention, x, cotangent)
    torch_out, torch_gradient = layer_in_torch(block.attention, x, cotangent)
    return float(np.abs(out - torch_out).max()), float(np.abs(gradient - torch_gradient).max())


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a small transformer on text with jflash attention.")
    parser.add_argument("--steps", type=int, default=400, help="training steps [400]")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the sample [0]")
    args = parser.parse_args()

    config = Config()
    shape = (config.batch, config.context, config.heads, config.width // config.heads)
    x, slopes = jax.ShapeDtypeStruct(shape, "float32"), jnp.asarray(alibi_slopes(config.heads))
    console.rule("Which backend runs, and why: jflash.explain")
    console.print(jflash.explain(x, x, x, causal=True, alibi_slopes=slopes))
    console.rule("Training")
    model, _ = train(config, args.steps, args.seed)
    console.rule("Sample")
    prompt = jnp.asarray(read_text()[1][: config.context], jnp.int32)
    written = np.asarray(sample(model, prompt, jax.random.key(args.seed), 400), np.uint8)
    console.print(written.tobytes().decode(errors="replace"), markup=False, soft_wrap=True)
    console.rule("The first attention layer from PyTorch, on the same weights")
    out, gradient = compare_with_torch(model, prompt[None])
    console.print(f"largest difference from JAX: output {out:.1e}, gradient of its input {gradient:.1e}")


if __name__ == "__main__":
    main()

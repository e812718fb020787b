"""Generates text with a key/value cache: a small model trained in JAX, decoded in JAX and in PyTorch.

    python -m examples.generate_text

The model is that of `examples.train_text`. Each step appends one token to the caches and attends to all of them:
`jflash.flash_attention_with_kvcache` in a jitted scan, `interop.flash_attn_with_kvcache` on torch tensors.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import jflash
from examples.train_text import Config, Decoder, alibi_slopes, console, read_text, train
from interop import flash_attn_with_kvcache


def empty_caches(config: Config, batch: int, length: int) -> list[tuple[jax.Array, jax.Array]]:
    """k_cache and v_cache [B, length, H, D] of each layer."""
    shape = (batch, length, config.heads, config.width // config.heads)
    return [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.layers)]


def next_logits(model: Decoder, caches, tokens: jax.Array, start):
    """Logits of the token after tokens [B, S], which go into the caches at `start`; and the caches."""
    x, after = model.embed(tokens), []
    for block, (k_cache, v_cache) in zip(model.blocks, caches, strict=True):
        layer, (B, S, width) = block.attention, x.shape
        q, k, v = jnp.unstack(layer.qkv(block.norm1(x)).reshape(B, S, 3, layer.heads, -1), axis=2)
        slopes = jnp.asarray(alibi_slopes(layer.heads))
        mixed, k_cache, v_cache = jflash.flash_attention_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=start, causal=True, alibi_slopes=slopes
        )
        after.append((k_cache, v_cache))
        x = x + layer.out(mixed.reshape(B, S, width))
        x = x + block.down(jax.nn.gelu(block.up(block.norm2(x))))
    return model.logits(model.norm(x[:, -1])), after


@functools.partial(nnx.jit, static_argnames="length")
def generate(model: Decoder, caches, prompt: jax.Array, length: int) -> jax.Array:
    """The `length` likeliest tokens [B, length] after a prompt [B, S], one by one."""
    logits, caches = next_logits(model, caches, prompt, 0)

    def step(carry, start):
        logits, caches = carry
        token = logits.argmax(axis=-1)
        return next_logits(model, caches, token[:, None], start), token

    starts = prompt.shape[1] + jnp.arange(length)
    return jax.lax.scan(step, (logits, caches), starts)[1].T


class TorchDecoder:
    """The same model on torch tensors, with the weights of the one in JAX."""

    def __init__(self, model: Decoder, config: Config):
        self.config, self.device = config, "cuda" if torch.cuda.is_available() else "cpu"
        self.blocks = [self.of_block(block) for block in model.blocks]
        self.embed, self.norm, self.logits = (
            self.tensor(x) for x in (model.embed.embedding, model.norm.scale, model.logits.kernel)
        )
        self.slopes = torch.tensor(alibi_slopes(config.heads), device=self.device)

    def tensor(self, parameter) -> torch.Tensor:
        return torch.tensor(np.asarray(parameter[...]), device=self.device)

    def of_block(self, block) -> tuple[torch.Tensor, ...]:
        layer = block.attention
        kernels = (
            block.norm1.scale,
            layer.qkv.kernel,
            layer.out.kernel,
            block.norm2.scale,
            block.up.kernel,
            block.down.kernel,
        )
        return tuple(map(self.tensor, kernels))

    def next_logits(self, caches, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits [B, vocabulary] of the token after tokens [B, S], which go into the caches at `start`."""
        x = self.embed[tokens]
        for (norm1, qkv, out, norm2, up, down), (k_cache, v_cache) in zip(self.blocks, caches, strict=True):
            q, k, v = (rms_norm(x, norm1) @ qkv).unflatten(-1, (3, self.config.heads, -1)).unbind(2)
            mixed = flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, cache_seqlens=start, causal=True, alibi_slopes=self.slopes
            )
            x = x + mixed.flatten(-2) @ out
            x = x + torch.nn.functional.gelu(rms_norm(x, norm2) @ up, approximate="tanh") @ down
        return rms_norm(x[:, -1], self.norm) @ self.logits

    @torch.no_grad()
    def generate(self, prompt: np.ndarray, length: int) -> np.ndarray:
        """As `generate`; the caches are written in place."""
        batch, S = prompt.shape
        shape = (batch, S + length, self.config.heads, self.config.width // self.config.heads)
        caches = [tuple(torch.zeros(shape, device=self.device) for _ in range(2)) for _ in self.blocks]
        tokens = [torch.tensor(prompt, device=self.device)]
        logits = self.next_logits(caches, tokens[0], 0)
        for start in range(S, S + length):
            tokens.append(logits.argmax(dim=-1, keepdim=True))
            logits = self.next_logits(caches, tokens[-1], start)
        return torch.cat(tokens[1:], dim=1).cpu().numpy()


def rms_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), scale, eps=1e-6)


def timed(f) -> tuple[np.ndarray, float]:
    """The result of the second call, when everything is compiled, and its seconds."""
    f()
    start = time.perf_counter()
    return np.asarray(f()), time.perf_counter() - start


def both(model: Decoder, config: Config, prompt: np.ndarray, length: int):
    """(tokens, seconds) of the generation in JAX, and in PyTorch."""
    room = prompt.shape[1] + length
    in_jax = timed(lambda: generate(model, empty_caches(config, len(prompt), room), jnp.asarray(prompt), length))
    decoder = TorchDecoder(model, config)
    return in_jax, timed(lambda: decoder.generate(prompt, length))


def main() -> None:
    parser = argparse.ArgumentParser(description="Generates text with a key/value cache, in JAX and in PyTorch.")
    parser.add_argument("--steps", type=int, default=400, help="training steps before [400]")
    parser.add_argument("--batch", type=int, default=4, help="texts at a time [4]")
    parser.add_argument("--length", type=int, default=200, help="tokens of each [200]")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches [0]")
    args = parser.parse_args()

    config = Config()
    console.rule("Training")
    model, _ = train(config, args.steps, args.seed)
    text = read_text()[1]
    starts = np.arange(args.batch)[:, None] * config.context
    prompt = text[starts + np.arange(config.context)].astype(np.int32)
    console.rule("Generating")
    (tokens, seconds), (torch_tokens, torch_seconds) = both(model, config, prompt, args.length)
    console.print(tokens[0].astype(np.uint8).tobytes().decode(errors="replace"), markup=False, soft_wrap=True)
    console.rule("Speed")
    count = args.batch * args.length
    console.print(f"JAX      {count / seconds:8,.0f} tokens/s")
    console.print(f"PyTorch  {count / torch_seconds:8,.0f} tokens/s")
    console.print(f"the same tokens: {(tokens == torch_tokens).mean():.0%}")


if __name__ == "__main__":
    main()

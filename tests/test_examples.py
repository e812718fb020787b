"""The programs that the README starts, made small."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments) -> str:
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("torch")
    from examples.train_text import Config, train

    config = Config(layers=1, width=32, context=64, batch=4)
    model, losses = train(config, steps=40, seed=0)
    return config, model, losses


def test_validation_loss_falls(trained):
    _, _, losses = trained
    assert losses[-1] < losses[0] - 1


def test_the_layer_is_the_same_in_torch(trained):
    from examples.train_text import compare_with_torch, read_text

    config, model, _ = trained
    tokens = jnp.asarray(read_text()[1][: config.context], jnp.int32)[None]
    out, gradient = compare_with_torch(model, tokens)
    assert out < 1e-5
    assert gradient < 1e-4


def test_sample_is_bytes_and_follows_its_key(trained):
    import jax

    from examples.train_text import read_text, sample

    config, model, _ = trained
    prompt = jnp.asarray(read_text()[1][: config.context], jnp.int32)
    first, again, other = (sample(model, prompt, jax.random.key(seed), 20) for seed in (0, 0, 1))
    assert first.shape == (20,)
    assert 0 <= first.min() <= first.max() < 256
    assert jnp.array_equal(first, again)
    assert not jnp.array_equal(first, other)


def test_train_text_runs_as_a_program():
    pytest.importorskip("torch")
    out = run("examples.train_text", "--steps", 5)
    for said in ("xla        forward   used", "validation loss", "tokens/s", "largest difference from JAX"):
        assert said in out


@pytest.mark.slow
def test_attention_plot_draws(tmp_path):
    pytest.importorskip("torch")
    plot = tmp_path / "out" / "plot.png"
    out = run("examples.attention_plot", "--lengths", 64, 128, "--out", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert out.count("MB") == 6


def test_naive_attention_stops_before_it_fills_the_memory():
    from examples.attention_plot import LENGTHS, lengths_for

    assert lengths_for("jflash", LENGTHS) == LENGTHS
    assert max(lengths_for("naive jnp", LENGTHS)) < max(LENGTHS)


def test_generation_is_the_same_in_torch_and_without_a_cache(trained):
    """Token by token from the caches, in both, as the likeliest after the whole text."""
    from examples.generate_text import both
    from examples.train_text import read_text

    config, model, _ = trained
    prompt = read_text()[1][: 2 * config.context].reshape(2, -1).astype("int32")
    (tokens, _), (torch_tokens, _) = both(model, config, prompt, 12)
    assert (tokens == torch_tokens).all()
    text = jnp.concatenate([jnp.asarray(prompt), jnp.asarray(tokens)], axis=1)
    likeliest = model(text)[:, config.context - 1 : -1].argmax(axis=-1)
    assert (likeliest == tokens).all()


@pytest.mark.slow
def test_generate_text_runs_as_a_program():
    pytest.importorskip("torch")
    out = run("examples.generate_text", "--steps", 3, "--length", 5, "--batch", 2)
    for said in ("JAX", "PyTorch", "tokens/s", "the same tokens"):
        assert said in out


def test_l1_matching_runs_as_a_program(tmp_path):
    plot = tmp_path / "plot.png"
    out = run("examples.l1_matching", "--steps", 20, "--out", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert out.count("after 20 steps") == 4

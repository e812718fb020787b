"""The backend for any device: blocked softmax attention in plain JAX, O(N) memory, every feature."""

from jflash.xla.backward import backward
from jflash.xla.forward import forward

__all__ = ["backward", "forward"]

"""The small tiles of tests/parity."""

from tests.parity.conftest import small_tiles

__all__ = ["small_tiles"]

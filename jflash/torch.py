"""`interop` under a name that no other package has: jflash for PyTorch tensors."""

from interop import *  # noqa: F403
from interop import __all__ as __all__

"""Settings that must be in place before JAX starts."""

import os

# The interpreter of Mosaic GPU runs each warpgroup on a thread of XLA's pool; with two cores the pool is so
# small that waiting warpgroups fill it and the one they wait for never runs.
os.environ.setdefault("PJRT_NPROC", "16")

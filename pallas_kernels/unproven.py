"""What the kernels can do as far as the CPU can tell, but no GPU has confirmed: no call is sent there.

A name goes when its tests in tests/gpu have passed; those tests, and the ones on the CPU, empty the set.
"""

FEATURES = {"dropout", "mask", "segment skipping", "bias", "row ends"}

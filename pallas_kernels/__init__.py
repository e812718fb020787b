"""GPU kernels and nothing else: arrays and a frozen problem description in, arrays out."""

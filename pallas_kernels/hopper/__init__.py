"""Mosaic GPU kernels for NVIDIA Hopper (compute capability 9.0)."""

def why_not(problem, direction):
    return "todo"
def forward(*a): raise NotImplementedError
def backward(*a): raise NotImplementedError

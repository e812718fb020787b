"""One table: head dim, mask and direction -> tile. The TF/s beside a row are what it measured, and where."""

from __future__ import annotations

import dataclasses

from pallas_kernels.problem import AttentionProblem


@dataclasses.dataclass(frozen=True)
class ForwardTile:
    """64 query rows for each of `warpgroups`, block_kv keys a step, `stages` steps loaded ahead."""

    block_kv: int
    warpgroups: int = 2
    stages: int = 2
    registers: int = 240  # of a consumer
    producer_registers: int = 24
    q_stages: int = 2  # tiles of Q in shared memory; the output of each leaves through its Q
    pinned: bool = False  # P(j) is formed ahead of the wait for P(j-1) V(j-1), where ptxas would move it behind
    lazy: bool = False  # the output fades only when scores grow a lot: worth a branch where it is wide
    spill_bytes: int = 0  # what ptxas may spill; the compile test fails above it

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups


@dataclasses.dataclass(frozen=True)
class BackwardTile:
    """block_kv keys a CTA, block_q queries a step.

    The two consumers take 64 keys each, or with `roles` the same 64 keys and other products.
    """

    block_q: int
    block_kv: int = 128
    stages: int = 2
    ds_stages: int = 2
    roles: bool = False
    split_rows: bool = False  # the two consumers share a dQ tile by rows, else by columns
    dq_apart: bool = False  # dQ is left to `attention_backward_q`, as it is for every deterministic call
    registers: int = 240
    producer_registers: int = 24
    spill_bytes: int = 0  # a mask or a softcap may cost a few


@dataclasses.dataclass(frozen=True)
class QueryGradientTile:
    """Of the kernel for dQ alone: blocks of 64 keys, and of their values, that shared memory holds."""

    stages: int = 2
    v_stages: int = 2


# TF/s full / causal at B2 S8192, bf16, H100 80GB HBM3, from bench/results/h100-attention.json.
FORWARD = {
    64: ForwardTile(  # 542 / 484
        block_kv=128, warpgroups=3, stages=3, registers=160, producer_registers=32
    ),
    128: ForwardTile(block_kv=128),  # 649 / 596
    192: ForwardTile(block_kv=64, pinned=True, lazy=True),  # 634 / 545 at B4 S4096, before `pinned` and `lazy`
    256: ForwardTile(block_kv=64, q_stages=1, pinned=True, lazy=True, spill_bytes=72),  # 709 / 689
}

FORWARD_WITH_BIAS = {  # docs/performance.md has what was measured
    **FORWARD,
    64: ForwardTile(block_kv=128, stages=3),  # tiles of 192 rows would copy a bias whose rows are not a multiple
    256: dataclasses.replace(FORWARD[256], spill_bytes=100),
}


BACKWARD = {
    64: BackwardTile(block_q=128, split_rows=True, spill_bytes=104),  # 526 / 461, that with the cut tile apart
    128: BackwardTile(block_q=64, spill_bytes=40),  # 568 / 553
    192: BackwardTile(block_q=64, block_kv=64, roles=True, dq_apart=True),  # 410 / 365 at B4 S4096
    256: BackwardTile(block_q=64, block_kv=64, roles=True, dq_apart=True, spill_bytes=52),  # 466 / 424
}

# More than the fused kernel has registers for at D64.
BACKWARD_CROWDED = {**BACKWARD, 64: BackwardTile(block_q=64, dq_apart=True)}

BACKWARD_WITH_BIAS = {**BACKWARD_CROWDED, 128: dataclasses.replace(BACKWARD[128], spill_bytes=72)}

BACKWARD_WITH_POSITIONS = {  # ALiBi of packed sequences: a slope and a position for each query
    **BACKWARD_CROWDED,
    128: dataclasses.replace(BACKWARD[128], spill_bytes=160),
    256: dataclasses.replace(BACKWARD[256], spill_bytes=60),
}

QUERY_GRADIENT = {  # measured at 64 and 128 only
    64: QueryGradientTile(),
    128: QueryGradientTile(),
    192: QueryGradientTile(),
    256: QueryGradientTile(v_stages=1),
}

QUERY_GRADIENT_CROWDED = {  # what comes with rows and keys takes more than two kilobytes
    **QUERY_GRADIENT,
    256: QueryGradientTile(stages=1, v_stages=1),
}


def padded(head_dim: int) -> int:
    """The head dim the kernels compute with."""
    return 64 * -(-head_dim // 64)


def forward_tile(p: AttentionProblem) -> ForwardTile:
    return (FORWARD if p.bias_shape is None else FORWARD_WITH_BIAS)[max(padded(p.D), padded(p.Dv))]


def backward_tile(p: AttentionProblem) -> BackwardTile:
    table = BACKWARD
    if p.bias_shape is not None:
        table = BACKWARD_WITH_BIAS
    elif p.key_ranges and p.alibi:
        table = BACKWARD_WITH_POSITIONS
    elif p.key_ranges or (p.softcap is not None and (p.left is not None or p.right is not None)):
        table = BACKWARD_CROWDED
    tile = table[max(padded(p.D), padded(p.Dv))]
    return dataclasses.replace(tile, dq_apart=tile.dq_apart or p.deterministic)


def query_gradient_tile(p: AttentionProblem) -> QueryGradientTile:
    crowded = p.segments or p.mask_shape is not None or (p.key_ranges and (p.dropout_rate > 0 or p.alibi))
    return (QUERY_GRADIENT_CROWDED if crowded else QUERY_GRADIENT)[max(padded(p.D), padded(p.Dv))]

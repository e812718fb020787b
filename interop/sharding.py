"""How DTensor may split attention: by batch and by heads. Importing this tells DTensor.

A call on shards is the same call on fewer sequences or fewer heads. What broadcasts over a split axis is
replicated, and its gradient is a sum over the shards. Split lengths are gathered first. Dropout counts batch
entries and heads from 0, so with a dropout seed nothing is split.
"""

from __future__ import annotations

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from interop.operands import TENSORS, Operands
from interop.ops import attention_backward, attention_forward

# Which axis of each operand is the batch, and which the heads.
_BATCH = Operands(0, 0, 0, 0, 0, 0, 0, 0, 0)
_HEADS = Operands(2, 2, 2, 1, 1, 1, None, None, 1)
_OUT_LSE = {_BATCH: (0, 0), _HEADS: (2, 1)}


@register_sharding(attention_forward)
def forward(*args):
    """Pairs of the placements of (out, lse) and of the arguments."""
    x, options = Operands(*args[:TENSORS]), args[TENSORS:]
    ways = [(_replicas(2), _replicas(x))]
    for axes in _splits(x):
        ways.append((list(map(Shard, _OUT_LSE[axes])), list(map(_placed, x, axes))))
    return [(outputs, [*inputs, *(None for _ in options)]) for outputs, inputs in ways]


@register_sharding(attention_backward)
def backward(*args):
    """Pairs of the placements of the gradients of q, k, v, bias, sinks and of the arguments."""
    rows, x, options = args[:4], Operands(*args[4 : 4 + TENSORS]), args[4 + TENSORS :]
    ways = [(_replicas(5), [*_replicas(rows), *_replicas(x)])]
    for axes in _splits(x):
        of_out, of_lse = _OUT_LSE[axes]
        rows_placed = map(_placed, rows, (of_out, of_lse, of_out, of_lse))
        wanted = Operands(*x)._replace(bias=x.bias if options[-1] else None)
        gradients = list(map(_gradient_placed, wanted[:5], axes[:5]))
        ways.append((gradients, [*rows_placed, *map(_placed, x, axes)]))
    return [(outputs, [*inputs, *(None for _ in options)]) for outputs, inputs in ways]


def _splits(x) -> list[Operands]:
    """The axes along which a call may be split."""
    if x.dropout_seed is not None:
        return []
    whole_groups = x.k.shape[2] % x.k.mesh.size() == 0  # a query head stays with its key/value head
    return [_BATCH, _HEADS] if whole_groups else [_BATCH]


def _replicas(tensors) -> list[Placement | None]:
    if isinstance(tensors, int):
        return [Replicate()] * tensors
    return [None if t is None else Replicate() for t in tensors]


def _placed(x, axis: int | None) -> Placement | None:
    if x is None:
        return None
    return Replicate() if axis is None or x.shape[axis] == 1 else Shard(axis)


def _gradient_placed(x, axis: int) -> Placement:
    if x is None:
        return Replicate()  # an empty tensor
    return Partial() if x.shape[axis] == 1 else Shard(axis)

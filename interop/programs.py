"""A JAX program of Mosaic GPU kernels as torch can run it: the kernels, and the little that lies between them.

JAX lowers a function to StableHLO. Where that holds nothing but kernels, and operations that only move values
(`_MOVES`), torch can do the moving and launch the kernels by itself, with XLA nowhere in the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from torch import Tensor

_KERNEL = "mosaic_gpu_v2"
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32}


class Unsupported(Exception):
    """The program holds something that only XLA can run."""


class Kernel(NamedTuple):
    """A Mosaic GPU kernel: operands in, outputs of known shapes out."""

    module: bytes  # as `MosaicGpuCompile` takes it
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    in_place: dict[int, int]  # output -> the operand whose memory it takes


class Step(NamedTuple):
    """One operation: a kernel, or a function of tensors. Values are numbered: inputs, constants, then results."""

    run: Kernel | Callable[..., Tensor]
    operands: tuple[int, ...]


class Program(NamedTuple):
    """What to run in turn, and the numbers of the results."""

    constants: list[Tensor]  # on the CPU
    steps: list[Step]
    returned: tuple[int, ...]


def lower(function: Callable, arguments: Sequence[jax.ShapeDtypeStruct | None]) -> Program:
    """The program of `function(*arrays)` on a GPU, whose results are a sequence of arrays. Needs no GPU.

    None among the arguments is passed on, and is not an input of the program.

    Raises:
        Unsupported: an operation that is neither a kernel nor a move.
    """
    lowered = jax.jit(function, keep_unused=True).trace(*arguments).lower(lowering_platforms=("cuda",))
    module: Any = lowered.compiler_ir()
    functions = {op.name.value: op.regions[0].blocks[0] for op in module.body.operations}
    reader, inputs = _Reader(functions), [_Value() for x in arguments if x is not None]
    return reader.program(inputs, reader.read("main", inputs))


class _Value:
    """What is known at the call only. Compared by identity."""


class _Reader:
    """Walks through functions, computing what is constant and noting the rest."""

    def __init__(self, functions: dict):
        self.functions = functions
        self.steps: list[tuple[Kernel | Callable, list, list[_Value]]] = []

    def read(self, name: str, arguments: Sequence) -> list:
        """The values that a function returns: a tensor where constant, else a `_Value`."""
        block = self.functions[name]
        known: dict = dict(zip(block.arguments, arguments, strict=True))
        for op in block.operations:
            op = op.operation
            operands = [known[x] for x in op.operands]
            if op.name == "func.return":
                return operands
            known.update(zip(op.results, self._results(op, operands), strict=True))
        raise Unsupported(f"{name} returns nothing")

    def _results(self, op, operands: list) -> list:
        if op.name == "func.call":
            return self.read(ir.FlatSymbolRefAttr(op.attributes["callee"]).value, operands)
        if op.name == "stablehlo.constant":
            return [_constant(op)]
        if op.name == "stablehlo.custom_call":
            return self._note(_kernel(op), operands, len(op.results))
        if op.name not in _MOVES:
            raise Unsupported(op.name)
        move = _MOVES[op.name](op, operands)
        if move is None:
            return operands[:1]
        if all(isinstance(x, Tensor) for x in operands):
            return [move(*operands)]
        return self._note(move, operands[:1], 1)

    def _note(self, run: Kernel | Callable, operands: list, count: int) -> list[_Value]:
        results = [_Value() for _ in range(count)]
        self.steps.append((run, operands, results))
        return results

    def program(self, inputs: list[_Value], returned: list) -> Program:
        _check_memory(self.steps, returned)
        uses = [x for _, operands, _ in self.steps for x in operands] + returned
        constants = list({id(x): x for x in uses if isinstance(x, Tensor)}.values())
        results = [x for _, _, found in self.steps for x in found]
        numbers = {id(x): n for n, x in enumerate([*inputs, *constants, *results])}
        steps = [Step(run, tuple(numbers[id(x)] for x in operands)) for run, operands, _ in self.steps]
        return Program(constants, steps, tuple(numbers[id(x)] for x in returned))


def _check_memory(steps: list, returned: list) -> None:
    """Results have memory of their own, and a kernel writes into nothing that is needed later."""
    own = {id(x) for _, _, results in steps for x in results}
    if not own.issuperset(map(id, returned)):
        raise Unsupported("a result that is an argument or a constant")
    for n, (run, operands, _) in enumerate(steps):
        later = {id(x) for _, others, _ in steps[n + 1 :] for x in others} | set(map(id, returned))
        for operand in run.in_place.values() if isinstance(run, Kernel) else ():
            if id(operands[operand]) not in own - later:
                raise Unsupported("a kernel in place on a value that is still needed")


def _constant(op) -> Tensor:
    shape, dtype = _type(op.results[0])
    value = op.attributes["value"]
    if value.is_splat:
        return torch.full(shape, value.get_splat_value().value, dtype=dtype)
    return torch.from_numpy(np.array(value)).to(dtype)


def _kernel(op) -> Kernel:
    attributes = op.attributes
    if attributes["call_target_name"].value != _KERNEL:
        raise Unsupported(attributes["call_target_name"].value)
    config = attributes["mhlo.backend_config"]
    if config["use_custom_barrier"].value or config["uses_xla_collective_metadata"].value:
        raise Unsupported("a kernel of several devices")
    for layout in [*attributes["operand_layouts"], *attributes["result_layouts"]]:
        order = np.array(layout).tolist()
        if order != sorted(order, reverse=True):
            raise Unsupported(f"a kernel with an array of layout {order}")
    in_place = dict(map(_alias, attributes["output_operand_aliases"]))
    return Kernel(config["module"].value_bytes, tuple(map(_type, op.results)), in_place)


def _alias(alias) -> tuple[int, int]:
    alias = stablehlo.OutputOperandAlias(alias)
    if alias.operand_tuple_indices or len(alias.output_tuple_indices) > 1:
        raise Unsupported(f"{alias}")
    return (*alias.output_tuple_indices, 0)[0], alias.operand_index


def _type(value) -> tuple[tuple[int, ...], torch.dtype]:
    type_ = ir.RankedTensorType(value.type)
    name = str(type_.element_type)
    if name not in _DTYPES:
        raise Unsupported(f"dtype {name}")
    return tuple(type_.shape), _DTYPES[name]


# --- what moves values: for an operation, a function of its first operand, or None where nothing changes


def _pad(op, operands) -> Callable | None:
    low, high, interior = (
        list(op.attributes[name]) for name in ("edge_padding_low", "edge_padding_high", "interior_padding")
    )
    if not any([*low, *high, *interior]):
        return None
    if any(interior) or min([*low, *high]) < 0 or not isinstance(operands[1], Tensor):
        raise Unsupported("stablehlo.pad other than at the ends, by a constant")
    widths = [n for pair in zip(reversed(low), reversed(high), strict=True) for n in pair]
    value = operands[1].item()
    return lambda x, *_: torch.nn.functional.pad(x, widths, value=value)


def _slice(op, _) -> Callable | None:
    starts, limits, strides = (list(op.attributes[name]) for name in ("start_indices", "limit_indices", "strides"))
    if set(strides) != {1}:
        raise Unsupported("stablehlo.slice with steps")
    whole = ir.RankedTensorType(op.operands[0].type).shape
    cuts = [(n, a, b - a) for n, (a, b) in enumerate(zip(starts, limits, strict=True)) if b - a < whole[n]]
    return (lambda x: functools.reduce(lambda y, cut: y.narrow(*cut), cuts, x).contiguous()) if cuts else None


def _broadcast(op, operands) -> Callable | None:
    shape, _ = _type(op.results[0])
    axes = list(op.attributes["broadcast_dimensions"])
    lengths = ir.RankedTensorType(op.operands[0].type).shape
    before = [1] * len(shape)
    for axis, length in zip(axes, lengths, strict=True):
        before[axis] = length
    return lambda x: x.reshape(before).expand(shape).contiguous()


def _convert(op, operands) -> Callable | None:
    before, after = _type(op.operands[0])[1], _type(op.results[0])[1]
    if before == after:
        return None
    if not isinstance(operands[0], Tensor):
        raise Unsupported("stablehlo.convert")  # of values, which may round in other ways
    return lambda x: x.to(after)


def _reshape(op, _) -> Callable | None:
    shape, _ = _type(op.results[0])
    return lambda x: x.reshape(shape)


_MOVES = {
    "stablehlo.pad": _pad,
    "stablehlo.slice": _slice,
    "stablehlo.broadcast_in_dim": _broadcast,
    "stablehlo.convert": _convert,
    "stablehlo.reshape": _reshape,
}

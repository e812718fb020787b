"""A JAX program of Mosaic GPU kernels as torch can run it: the kernels, and the little that lies between them.

JAX lowers a function to StableHLO. Where that holds nothing but kernels, and operations that torch does to the same
bits (`_OPERATIONS`: they move values, or compute with integers), torch can do these and launch the kernels by itself,
with XLA nowhere in the call.
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

from interop import bridge

_KERNEL = "mosaic_gpu_v2"
_FLOATING = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_DTYPES = {**_FLOATING, "i32": torch.int32, "i1": torch.bool}


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

    inputs: int
    constants: list[Tensor]  # on the CPU
    steps: list[Step]
    returned: tuple[int, ...]
    to_first: int  # the steps up to the first of the results


def lower(function: Callable, arguments: Sequence[jax.ShapeDtypeStruct | None]) -> Program:
    """The program of `function(*arrays)` on a GPU, whose results are a sequence of arrays. Needs no GPU.

    None among the arguments is passed on, and is not an input of the program.

    Raises:
        Unsupported: an operation that is neither a kernel nor one of `_OPERATIONS`.
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
        if op.name == "stablehlo.optimization_barrier":
            return operands
        if op.name == "stablehlo.sort":
            _check_sort(op)
            axis = op.attributes["dimension"].value
            runs = [lambda x, *_: x.sort(axis).values, lambda x, y: y.gather(axis, x.argsort(stable=True, dim=axis))]
            return [self._note(run, operands, 1)[0] for run in runs[: len(operands)]]
        if op.name not in _OPERATIONS:
            raise Unsupported(op.name)
        operation = _OPERATIONS[op.name](op, operands)
        if all(isinstance(x, Tensor) for x in operands):
            return [operation(*operands)]
        return operands[:1] if operation is _same else self._note(operation, operands, 1)

    def _note(self, run: Kernel | Callable, operands: list, count: int) -> list[_Value]:
        results = [_Value() for _ in range(count)]
        self.steps.append((run, operands, results))
        return results

    def program(self, inputs: list[_Value], returned: list) -> Program:
        steps = _needed(self.steps, returned)
        _check_memory(steps, returned)
        uses = [x for _, operands, _ in steps for x in operands] + returned
        constants = list({id(x): x for x in uses if isinstance(x, Tensor)}.values())
        results = [x for _, _, found in steps for x in found]
        numbers = {id(x): n for n, x in enumerate([*inputs, *constants, *results])}
        of_kernels = {id(x) for run, operands, _ in steps if isinstance(run, Kernel) for x in [*operands, *returned]}
        found = [
            Step(_dense(run) if id(results[0]) in of_kernels else run, tuple(numbers[id(x)] for x in operands))
            for run, operands, results in steps
        ]
        to_first = next(n for n, (_, _, results) in enumerate(steps) if returned[0] in results) + 1
        return Program(len(inputs), constants, found, tuple(numbers[id(x)] for x in returned), to_first)


def _needed(steps: list, returned: list) -> list:
    """The steps whose results somebody uses."""
    wanted, found = set(map(id, returned)), []
    for step in reversed(steps):
        _, operands, results = step
        if not wanted.isdisjoint(map(id, results)):
            found.append(step)
            wanted |= set(map(id, operands))
    return found[::-1]


def _dense(run: Kernel | Callable[..., Tensor]) -> Kernel | Callable[..., Tensor]:
    """The step with its result as kernels and callers expect memory."""
    return run if isinstance(run, Kernel) else lambda *operands: bridge.canonical(run(*operands))


def _check_memory(steps: list, returned: list) -> None:
    """Results have memory of their own, and a kernel writes into nothing that is needed later."""
    if not {id(x) for _, _, results in steps for x in results}.issuperset(map(id, returned)):
        raise Unsupported("a result that is an argument or a constant")
    own = {id(x) for run, _, results in steps if isinstance(run, Kernel) for x in results}
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


def _shape(value) -> tuple[int, ...]:
    return tuple(ir.RankedTensorType(value.type).shape)


def _type(value) -> tuple[tuple[int, ...], torch.dtype]:
    type_ = ir.RankedTensorType(value.type)
    name = str(type_.element_type)
    if name not in _DTYPES:
        raise Unsupported(f"dtype {name}")
    return _shape(value), _DTYPES[name]


# --- what torch does to the same bits: for an operation and its operands, a function of these


def _same(x: Tensor, *_) -> Tensor:
    return x


def _pad(op, operands) -> Callable:
    low, high, interior = (
        list(op.attributes[name]) for name in ("edge_padding_low", "edge_padding_high", "interior_padding")
    )
    if not any([*low, *high, *interior]):
        return _same
    if any(interior) or min([*low, *high]) < 0 or not isinstance(operands[1], Tensor):
        raise Unsupported("stablehlo.pad other than at the ends, by a constant")
    widths = [n for pair in zip(reversed(low), reversed(high), strict=True) for n in pair]
    value = operands.pop().item()
    return lambda x, *_: torch.nn.functional.pad(x, widths, value=value)


def _slice(op, _) -> Callable:
    starts, limits, strides = (list(op.attributes[name]) for name in ("start_indices", "limit_indices", "strides"))
    if set(strides) != {1}:
        raise Unsupported("stablehlo.slice with steps")
    whole = _shape(op.operands[0])
    cuts = [(n, a, b - a) for n, (a, b) in enumerate(zip(starts, limits, strict=True)) if b - a < whole[n]]
    return (lambda x: functools.reduce(lambda y, cut: y.narrow(*cut), cuts, x)) if cuts else _same


def _check_sort(op) -> None:
    """As `sort` and `argsort` have it: integers from the least to the greatest, and a second array in their order."""
    block = op.regions[0].blocks[0]
    compare, *rest = (inner.operation for inner in block.operations)
    if len(op.operands) > 2 or len(rest) != 1 or compare.name != "stablehlo.compare":
        raise Unsupported("stablehlo.sort other than sort and argsort")
    by_first = list(compare.operands) == list(block.arguments)[:2]
    if not by_first or _direction(compare) != "LT" or _type(op.operands[0])[1].is_floating_point:
        raise Unsupported("stablehlo.sort other than of integers, the least first")


def _direction(compare) -> str:
    return stablehlo.ComparisonDirectionAttr(compare.attributes["comparison_direction"]).value


def _broadcast(op, _) -> Callable:
    shape, lengths = _shape(op.results[0]), _shape(op.operands[0])
    before = [1] * len(shape)
    for axis, length in zip(op.attributes["broadcast_dimensions"], lengths, strict=True):
        before[axis] = length
    if before == list(shape):
        return lambda x: x.reshape(shape)
    return (lambda x: x.expand(shape)) if before == list(lengths) else lambda x: x.reshape(before).expand(shape)


def _convert(op, operands) -> Callable:
    before, after = _type(op.operands[0])[1], _type(op.results[0])[1]
    if before == after:
        return _same
    exact = before == torch.bool or (before.is_floating_point and after == torch.float32)
    if not exact and not isinstance(operands[0], Tensor):
        raise Unsupported(f"stablehlo.convert of {before} to {after}")  # which may round in other ways
    return lambda x: x.to(after)


def _reshape(op, _) -> Callable:
    shape = _shape(op.results[0])
    return lambda x: x.reshape(shape)


def _iota(op, _) -> Callable:
    shape, dtype = _type(op.results[0])
    axis = op.attributes["iota_dimension"].value
    row = torch.arange(shape[axis]).to(dtype)
    return lambda: row.view([-1 if n == axis else 1 for n in range(len(shape))]).expand(shape)


def _transpose(op, _) -> Callable:
    order = list(op.attributes["permutation"])
    return lambda x: x.permute(order)


def _reverse(op, _) -> Callable:
    axes = list(op.attributes["dimensions"])
    return lambda x: x.flip(axes)


def _concatenate(op, operands) -> Callable:
    axis = op.attributes["dimension"].value
    empty = [_shape(x)[axis] == 0 for x in op.operands]
    operands[:] = [x for x, without in zip(operands, empty, strict=True) if not without]
    return _same if len(operands) == 1 else lambda *parts: torch.cat(parts, axis)


def _compare(op, _) -> Callable:
    return getattr(torch, _direction(op).lower())


def _of(function: Callable[..., Tensor], *floating: torch.dtype) -> Callable:
    """An operation on integers, and on the floating-point numbers given: sums of products may be rounded as one."""

    def operation(op, operands) -> Callable:
        dtype = _type(op.results[0])[1]
        if dtype.is_floating_point and dtype not in floating and not all(isinstance(x, Tensor) for x in operands):
            raise Unsupported(f"{op.name} of {dtype}")
        return function

    return operation


def _reduce(op, operands) -> Callable:
    """Sums and extremes of integers, `any` and `all`."""
    start, dtype, axes = operands[-1], _type(op.operands[0])[1], list(op.attributes["dimensions"])
    by = [inner.operation.name for inner in op.regions[0].blocks[0].operations]
    if len(operands) != 2 or len(by) != 2 or by[0] not in _REDUCTIONS or dtype.is_floating_point:
        raise Unsupported(f"stablehlo.reduce of {dtype} by {', '.join(by)}")
    reduction, of_nothing = _REDUCTIONS[by[0]]
    if not isinstance(start, Tensor) or start.item() != of_nothing:
        raise Unsupported("stablehlo.reduce from a value of its own")
    operands.pop()
    return lambda x: reduction(x, axes)


_LIMITS = torch.iinfo(torch.int32)
_REDUCTIONS = {  # and what each makes of nothing
    "stablehlo.add": (functools.partial(torch.sum, dtype=torch.int32), 0),
    "stablehlo.minimum": (torch.amin, _LIMITS.max),
    "stablehlo.maximum": (torch.amax, _LIMITS.min),
    "stablehlo.or": (torch.any, False),
    "stablehlo.and": (torch.all, True),
}
_OPERATIONS = {
    "stablehlo.pad": _pad,
    "stablehlo.slice": _slice,
    "stablehlo.broadcast_in_dim": _broadcast,
    "stablehlo.convert": _convert,
    "stablehlo.reshape": _reshape,
    "stablehlo.iota": _iota,
    "stablehlo.transpose": _transpose,
    "stablehlo.reverse": _reverse,
    "stablehlo.concatenate": _concatenate,
    "stablehlo.compare": _compare,
    "stablehlo.select": lambda op, _: torch.where,
    "stablehlo.add": _of(torch.add),
    "stablehlo.subtract": _of(torch.sub),
    "stablehlo.multiply": _of(torch.mul, torch.float32),
    "stablehlo.divide": _of(functools.partial(torch.div, rounding_mode="trunc")),
    "stablehlo.minimum": _of(torch.minimum),
    "stablehlo.maximum": _of(torch.maximum),
    "stablehlo.and": _of(torch.bitwise_and),
    "stablehlo.or": _of(torch.bitwise_or),
    "stablehlo.not": _of(torch.bitwise_not),
    "stablehlo.reduce": _reduce,
}

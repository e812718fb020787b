"""PTX in the middle of a kernel: instructions for which MLIR has no operation.

`$0`, `$1`, ... are the results, then the operands; constraints are those of LLVM, results first ("=f,r").
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm


def effect(text: str, operands: Sequence, constraints: str) -> None:
    """An instruction for what it does."""
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)


def result(kind: ir.Type, text: str, operands: Sequence, constraints: str, *, stays: bool = False) -> ir.Value:
    """The result of an instruction. stays: it may not be moved, as where it depends on other threads."""
    found = llvm.inline_asm(kind, operands, text, constraints, has_side_effects=stays)
    assert isinstance(found, ir.Value)
    return found


def results(
    kind: ir.Type, count: int, text: str, operands: Sequence, constraints: str, *, stays: bool = False
) -> list[ir.Value]:
    """The results of an instruction that has several, all of that kind."""
    found = result(llvm.StructType.get_literal([kind] * count), text, operands, constraints, stays=stays)
    return [llvm.extractvalue(kind, found, [n]) for n in range(count)]

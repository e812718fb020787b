"""The mask of dropout inside a kernel is the oracle's: its MLIR, folded to constants, gives the same bits."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import func

from pallas_kernels.parts import dropout
from pallas_kernels.parts.wgmma_layout import Word, integer

JS = (0, 1, 77, 4095, 2**31 + 5, 2**32 - 1)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
def test_mlir_follows_jnp(rate):
    rng = np.random.default_rng(0)
    firsts, seconds = rng.integers(0, 2**32, (2, 40), dtype=np.uint64).astype(np.uint32)
    first, second = (jnp.asarray(x)[:, None] for x in (firsts, seconds))
    expected = dropout.keep(first, second, jnp.asarray(JS, jnp.uint32), rate)
    assert len(np.unique(expected)) == 2
    assert _folded(firsts, seconds, rate) == np.asarray(expected).ravel().tolist()


def _folded(firsts, seconds, rate: float) -> list[bool]:
    """What a compiler makes of `survives` on constants."""
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.create()
        bit = ir.IntegerType.get_signless(1)
        count = len(firsts) * len(JS)
        with ir.InsertionPoint(module.body):
            function = func.FuncOp("f", ir.FunctionType.get([], [bit] * count))
            with ir.InsertionPoint(function.add_entry_block()):
                found = [
                    dropout.survives(Word(integer(int(x))) + j * dropout.WEYL, Word(integer(int(y))), rate)
                    for x, y in zip(firsts, seconds, strict=True)
                    for j in JS
                ]
                func.ReturnOp(found)
        passmanager.PassManager.parse("builtin.module(canonicalize)").run(module.operation)
        (block,) = function.body.blocks
        values = list(block.operations)[-1].operands
        return [bool(ir.IntegerAttr(x.owner.attributes["value"]).value) for x in values]

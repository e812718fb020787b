"""Compiles the decode kernel for an H100: no spills, no serialized wgmma, and registers for CTAs that share an SM."""

import pytest

from pallas_kernels.hopper import decode
from tests.kernels.calls import on_hopper
from tests.kernels.h100 import compile_for_h100
from tests.kernels.test_decode import SHAPES, call_on_shapes

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("name", SHAPES)
def test_ptxas_has_no_complaint(name):
    run, shapes = call_on_shapes(**SHAPES[name])
    with on_hopper():
        _, (kernel,) = compile_for_h100(run, *shapes)
    assert kernel.serialized is None
    assert kernel.spill_bytes == 0
    assert kernel.registers * 128 * decode.TILES[shapes[0].shape[-1]].ctas <= 65536

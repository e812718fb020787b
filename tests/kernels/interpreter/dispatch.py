"""More primitives for the interpreter: run_state, loads with a layout, layout casts, accumulator stores, waits.

The interpreter matches on primitives inside one long method, so the method is compiled again with more cases.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
import types

import jax
from jax._src import core as jax_core
from jax._src.pallas import primitives as pallas_primitives
from jax._src.pallas.mosaic_gpu import core as mosaic_core
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret
from jax._src.state import discharge
from jax._src.state import primitives as state_primitives
from jax._src.state import types as state_types

from tests.kernels.interpreter import products

Interpreter = jaxpr_interpret.JaxprInterpreter
_NO_INDEX = jax.tree.structure(())
_FIRST_CASE = "case lax.axis_index_p:"
_CASES = {
    "run_state_p": "token, out = _more.run_state(self, eqn, token, deferred_invals)",
    "load_p": "token, out = _more.load(self, eqn, token, deferred_invals)",
    "accumulator_store_p": "token, out = _more.accumulator_store(self, eqn, token, deferred_invals)",
    "layout_cast_p": "out = deferred_invals()[0]",
    "wgmma_wait_p": "token, out = _more.wgmma_wait(self, eqn, token), []",
}


def register_ref(aval):
    """The type of a ref to registers like a value."""
    return state_types.AbstractRef(jax_core.ShapedArray(aval.shape, aval.dtype), mosaic_core.MemorySpace.REGS)


def equation(primitive, params: dict, inputs, outputs, like):
    """What the interpreter needs of an equation of a jaxpr."""
    var = lambda aval: types.SimpleNamespace(aval=aval)  # noqa: E731
    return types.SimpleNamespace(
        primitive=primitive,
        params=params,
        invars=[*map(var, inputs)],
        outvars=[*map(var, outputs)],
        source_info=like.source_info,
    )


class Body:
    """Stands where the interpreter expects the jaxpr of a run_scoped."""

    def __init__(self, refs, run):
        self.invars, self.constvars, self.run = [types.SimpleNamespace(aval=x) for x in refs], [], run


def with_registers(self, eqn, token, avals, values, run):
    """run(token, *keys) -> (token, outs) with a register buffer for each value.

    Returns the token, what the buffers hold in the end, and outs.
    """
    refs = [register_ref(aval) for aval in avals]

    def filled(token, *keys):
        for key, aval, ref, value in zip(keys, avals, refs, values, strict=True):
            store = equation(state_primitives.swap_p, {"tree": _NO_INDEX}, [ref, aval], [aval], eqn)
            token, _ = self._interpret_swap_p(store, token, lambda operands=(key, value): list(operands))
        token, outs = run(token, *keys)
        finals = []
        for key, aval, ref in zip(keys, avals, refs, strict=True):
            get = equation(state_primitives.get_p, {"tree": _NO_INDEX}, [ref], [aval], eqn)
            token, final = self._interpret_get_p(get, token, lambda key=key: [key])
            finals.append(final)
        return token, [finals, outs]

    params = {"jaxpr": Body(refs, filled), "collective_axes": (), "ref_transforms": ((),) * len(refs)}
    scoped = equation(pallas_primitives.run_scoped_p, params, [], [], eqn)
    token, (finals, outs) = self._interpret_run_scoped_p(scoped, token, lambda: [])
    return token, finals, outs


def run_state(self, eqn, token, invals):
    if not all(eqn.params["is_initialized"]):
        raise NotImplementedError("run_state of uninitialized refs")
    outs = list(invals())
    own = [i for i, v in enumerate(eqn.outvars) if not isinstance(v.aval, state_types.AbstractRef)]

    def run(token, *keys):
        operands = list(outs)
        for i, key in zip(own, keys, strict=True):
            operands[i] = key
        token, results = self.interpret(eqn.params["jaxpr"], token, *operands)
        return products.wait(self, token, 0), results  # run_state waits for every wgmma in it

    avals, values = [eqn.outvars[i].aval for i in own], [outs[i] for i in own]
    token, finals, _ = with_registers(self, eqn, token, avals, values, run)
    for i, final in zip(own, finals, strict=True):
        outs[i] = final
    return token, outs


def load(self, eqn, token, invals):
    inputs, outputs = ([v.aval for v in vs] for vs in (eqn.invars, eqn.outvars))
    get = equation(state_primitives.get_p, eqn.params, inputs, outputs, eqn)
    return self._interpret_get_p(get, token, invals)


def accumulator_store(self, eqn, token, invals):
    aval = eqn.invars[0].aval.inner_aval
    swap = equation(state_primitives.swap_p, {"tree": _NO_INDEX}, [register_ref(aval), aval], [aval], eqn)
    return self._interpret_swap_p(swap, token, invals)


def wgmma_wait(self, eqn, token):
    n = eqn.params["n"] if "n" in eqn.params else eqn.invars[0].val
    return products.wait(self, token, int(n))


def _wgmma_of_registers(original):
    """wgmma whose left operand is in registers: through a register buffer."""

    def wgmma(self, eqn, token, invals):
        left = eqn.invars[1].aval
        if isinstance(left, state_types.AbstractRef):
            return original(self, eqn, token, invals)
        accumulator, value, *rest = invals()

        def run(token, key):
            return original(self, eqn, token, lambda: [accumulator, key, *rest])

        token, _, outs = with_registers(self, eqn, token, [left], [value], run)
        return token, outs

    return wgmma


def _with_more_cases():
    """Interpreter.interpret with our cases ahead of its own."""
    lines = textwrap.dedent(inspect.getsource(Interpreter.interpret)).splitlines()
    (first,) = (n for n, line in enumerate(lines) if line.strip() == _FIRST_CASE)
    pad = lines[first].removesuffix(_FIRST_CASE)
    cases = [line for name, do in _CASES.items() for line in (f"{pad}case _more.{name}:", f"{pad}    {do}")]
    primitives = types.SimpleNamespace(
        run_state_p=discharge.run_state_p,
        load_p=gpu_primitives.load_p,
        accumulator_store_p=gpu_primitives.wgmma_accumulator_store_p,
        layout_cast_p=getattr(mosaic_core, "layout_cast_p", None) or gpu_primitives.layout_cast_p,
        wgmma_wait_p=gpu_primitives.wgmma_wait_p,
        run_state=run_state,
        load=load,
        accumulator_store=accumulator_store,
        wgmma_wait=wgmma_wait,
    )
    scope = {**vars(jaxpr_interpret), "_more": primitives}
    exec(compile("\n".join(lines[:first] + cases + lines[first:]), f"{__file__}:interpret", "exec"), scope)
    return scope["interpret"]


@functools.cache
def install() -> None:
    original = _with_more_cases()

    def interpret(self, jaxpr, token, *operands):
        if isinstance(jaxpr, Body):
            return jaxpr.run(token, *operands)
        return original(self, jaxpr, token, *operands)

    Interpreter.interpret = interpret
    Interpreter._interpret_wgmma_ref_p = _wgmma_of_registers(Interpreter._interpret_wgmma_ref_p)

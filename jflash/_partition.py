"""How a call is split over devices: its batch and its heads are parted, its lengths and head dims are whole on each.

XLA sees neither into a kernel nor through the loops of the xla backend, so untold it would bring everything to
every device. `over_devices` tells it, for Shardy and for GSPMD: each device runs the same function on its part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec


class Call(NamedTuple):
    """A function of a problem and its operands, and a string for each array with a letter for each of its axes.

    "B": parted with the batch. "H": parted with the heads. Any other: whole. An axis of length 1 broadcasts: it is
    whole as well, and if a result has it that result is a sum over the devices.
    """

    function: Callable  # (problem, *operands) -> results, both pytrees
    problem: Any
    of_part: Callable  # (problem, operands of a part, which part of the heads) -> the problem and operands of the part
    tree: Any  # of the operands
    operands: tuple[str, ...]
    results: tuple[str, ...]


Parts = dict[str, tuple[str, ...]]  # the axes of the mesh over which "B" and "H" are parted


def over_devices(function: Callable, problem, operands, of_part: Callable, axes, result_axes) -> Any:
    """function(problem, *operands), which XLA may split over devices.

    `axes` and `result_axes` are pytrees of the strings that Call describes. Inside `jax.shard_map` a call is of one
    device already. A process of one device, outside of a mesh, traces the function alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() == 1:
        return function(problem, *operands)
    leaves, tree = jax.tree.flatten(operands)
    jaxpr, shapes = _traced(functools.partial(function, problem), operands)
    if mesh.manual_axes:
        results = varying_over(varying(leaves), _on_one_device(jaxpr, leaves))
    else:
        call = Call(function, problem, of_part, tree, _letters(operands, axes), _letters(shapes, result_axes))
        results = _split(call, jaxpr, *leaves)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


@functools.partial(custom_partitioning, static_argnums=(0, 1))
def _split(call: Call, jaxpr, *leaves: jax.Array) -> list[jax.Array]:
    return _on_one_device(jaxpr, leaves)


def _partition(call: Call, _, mesh, operands: Sequence, results: Sequence):
    """What a device does, and how operands and results lie on the devices."""
    letters, sizes = (*call.operands, *call.results), _sizes(call.operands, [x.shape for x in operands])
    parts = _parts(letters, (*operands, *results), mesh, sizes)

    def on_part(*leaves):
        with jax.sharding.use_abstract_mesh(_NO_MESH):
            index = lax.axis_index(parts["H"]) if parts["H"] else 0
            problem, mine = call.of_part(call.problem, jax.tree.unflatten(call.tree, leaves), index)
            jaxpr, _ = _traced(functools.partial(call.function, problem), mine)
            found = _on_one_device(jaxpr, jax.tree.leaves(mine))
            return [_summed(x, names) for x, names in zip(found, shared, strict=True)]

    shared = [_sharing(parts, letters, x.shape) for letters, x in zip(call.results, results, strict=True)]
    place = lambda letters, x: NamedSharding(mesh, _spec(parts, letters, x.shape))  # noqa: E731
    return mesh, on_part, list(map(place, call.results, results)), tuple(map(place, call.operands, operands))


def _infer(call: Call, _, mesh, operands: Sequence, results: Sequence):
    """How results lie where operands do (GSPMD asks; Shardy has the rule)."""
    parts = _parts(call.operands, operands, mesh, _sizes(call.operands, [x.shape for x in operands]))
    return [
        NamedSharding(mesh, _spec(parts, letters, x.shape)) for letters, x in zip(call.results, results, strict=True)
    ]


def _rule(call: Call, _, mesh, operand_types: Sequence, result_types: Sequence):
    """The rule of Shardy: axes with one name are parted alike, and the others are whole.

    Where heads share key/value heads the two are named apart: Shardy would part a group else.
    """
    arrays, whole = [], []
    for letters, x in zip((*call.operands, *call.results), (*operand_types, *result_types), strict=True):
        arrays.append([])
        for letter, length in zip(letters, x.shape, strict=False):
            parted = letter in "BH" and length > 1
            arrays[-1].append(f"{letter}{length}" if parted else f"x{len(whole)}")
            whole += [] if parted else arrays[-1][-1:]
    count, arrays = len(operand_types), [" ".join(names) for names in arrays]
    rule = ", ".join(arrays[:count]) + " -> " + ", ".join(arrays[count:])
    return rule, {"need_replication_factors": tuple(whole)}


_split.def_partition(_partition, infer_sharding_from_operands=_infer, sharding_rule=_rule)


def _letters(tree, axes) -> tuple[str, ...]:
    """The strings of the arrays that are there."""
    absent = lambda x: x is None  # noqa: E731
    found = jax.tree.map(lambda x, letters: x if x is None else letters, tree, axes, is_leaf=absent)
    return tuple(jax.tree.leaves(found))


def _sizes(letters: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """How many parts of the batch and of the heads there could be: groups of heads stay whole."""
    found = {"B": 0, "H": 0}
    for letters_of_one, shape in zip(letters, shapes, strict=True):
        for letter, length in zip(letters_of_one, shape, strict=False):
            if letter in found and length > 1:
                found[letter] = math.gcd(found[letter], length)
    return {letter: max(n, 1) for letter, n in found.items()}


def _parts(letters: Sequence[str], arrays: Sequence, mesh, sizes: dict[str, int]) -> Parts:
    """Over which axes of the mesh: those of the first array that is parted there, as many as leave equal parts."""
    found: Parts = {"B": (), "H": ()}
    for letters_of_one, x in zip(letters, arrays, strict=True):
        spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else ()
        for letter, length, names in zip(letters_of_one, x.shape, spec, strict=False):
            if letter in found and not found[letter] and length > 1 and names is not None:
                names = (names,) if isinstance(names, str) else tuple(names)
                free = [name for name in names if name not in found["B"] + found["H"]]
                found[letter] = _dividing(mesh, sizes[letter], free)
    return found


def _dividing(mesh, size: int, names: Sequence[str]) -> tuple[str, ...]:
    """The first of the names, as many as cut a size into equal parts."""
    count = 0
    while count < len(names) and size % math.prod(mesh.shape[name] for name in names[: count + 1]) == 0:
        count += 1
    return tuple(names[:count])


def _spec(parts: Parts, letters: str, shape: tuple[int, ...]) -> PartitionSpec:
    axes = (parts.get(letter) if n > 1 else None for letter, n in zip(letters, shape, strict=False))
    return PartitionSpec(*(names or None for names in axes))


def _sharing(parts: Parts, letters: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The axes of the mesh along which devices add to one result of this shape."""
    return tuple(name for letter, n in zip(letters, shape, strict=False) if n == 1 for name in parts.get(letter, ()))


def _summed(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return lax.psum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), names).astype(x.dtype) if names else x


# --- on one device


def _traced(function: Callable, operands):
    """The jaxpr of function(*operands) on one device, and the shapes of its results."""
    from pallas_kernels._compat import unchecked_axes  # brings Mosaic GPU along, which takes a while

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    with jax.sharding.use_abstract_mesh(_NO_MESH), unchecked_axes():
        return jax.make_jaxpr(function, return_shape=True)(*shapes)


def _on_one_device(jaxpr, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """What a jaxpr gives, which need not know over which axes of a mesh its values vary."""
    avals = {"in_avals": tuple(jaxpr.in_avals), "out_avals": tuple(jaxpr.out_avals)}
    return _one_device_p.bind(*leaves, run=jaxpr_as_fun(jaxpr), **avals)


_NO_MESH = jax.sharding.AbstractMesh((), ())
_one_device_p = Primitive("attention_on_one_device")
_one_device_p.multiple_results = True
_one_device_p.def_impl(lambda *leaves, run, **_: run(*leaves))
_one_device_p.def_abstract_eval(lambda *_, out_avals, **__: list(out_avals))


def _lower(ctx, *values, run, in_avals, **_):
    return mlir.lower_fun(run, multiple_results=True)(ctx.replace(avals_in=in_avals), *values)


mlir.register_lowering(_one_device_p, _lower)


def varying(tree) -> frozenset[str]:
    """The manual axes of a mesh over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def typed(function: Callable, operands, axes, result_axes) -> Any:
    """function(operands), where the types of JAX tell how arrays lie on a mesh.

    Inside `jax.shard_map` all operands come to vary over the axes over which one of them does, so that the gradient
    of one that did not is a sum. On a mesh with explicit axes the results lie as the operands do.
    """
    mesh, operands = jax.sharding.get_abstract_mesh(), varying_over(varying(operands), operands)
    if not mesh.explicit_axes:
        return function(operands)
    leaves, letters = [jax.typeof(x) for x in jax.tree.leaves(operands)], _letters(operands, axes)
    parts = _parts(letters, leaves, mesh, _sizes(letters, [x.shape for x in leaves]))
    shapes = jax.eval_shape(jax.sharding.auto_axes(function, out_sharding=PartitionSpec()), operands)
    found = map(
        functools.partial(_spec, parts), _letters(shapes, result_axes), [x.shape for x in jax.tree.leaves(shapes)]
    )
    specs = jax.tree.unflatten(jax.tree.structure(shapes), list(found))
    return jax.sharding.auto_axes(function, out_sharding=specs)(operands)


def varying_over(names: frozenset[str], tree):
    """Arrays that vary over these manual axes; the gradient of one that did not is a sum over them."""

    def cast(x):
        missing = tuple(names - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)

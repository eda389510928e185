"""Trees of shardings: of parameters, and of the arrays in a state that belong to them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import tree_leaves_with_path
import numpy as np
import optax

from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._types import PyTree
from rmsprop_jax.sharding._arguments import check_shardings
from rmsprop_jax.sharding._division import (
    Shape,
    division,
    filled_shape,
    is_even,
    mesh_axes,
    part_of,
)
from rmsprop_jax.sharding._owners import owners


def shardings_of_params(shardings: PyTree, params: optax.Params) -> PyTree:
    """One sharding for each parameter, from a prefix of the tree of shardings."""
    check_shardings(shardings)
    return jax.tree.broadcast(shardings, params)


def shardings_of_state(
    state: optax.OptState, params: optax.Params, shardings: PyTree, others: NamedSharding | None
) -> PyTree:
    """One sharding for each array of a state: that of its parameter, or others if it has none.

    Only the structure and shapes of state and params matter.
    """
    wanted = jax.tree.leaves(shardings)
    found = [
        others if owner is None else wanted[owner] for owner in owners(state, params, shardings)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), found)


def check_divided(params: optax.Params, shardings: PyTree) -> None:
    """Refuses shardings that do not divide their parameters."""
    wanted = jax.tree.leaves(shardings)
    for (path, param), sharding in zip(tree_leaves_with_path(params), wanted, strict=True):
        if not is_even(sharding, np.shape(param)):
            raise ValueError(
                f"parameter {leaf_name(path)!r} has the shape {np.shape(param)}, which "
                f"{sharding.spec} does not divide on a mesh of {dict(sharding.mesh.shape)}"
            )


def split_over(
    axes: Sequence[str], params: optax.Params, shardings: PyTree, *, pad: bool
) -> PyTree:
    """The shardings of parameters, extended by more mesh axes as :func:`division` decides.

    With pad, a parameter that a sharding does not divide is padded. A parameter that is split over
    one of the axes already keeps its sharding.
    """

    def split(param: Any, sharding: NamedSharding) -> NamedSharding:
        return _with_axes(axes, sharding, np.shape(param), pad)

    return jax.tree.map(split, params, shardings)


def all_even(shardings: PyTree, params: optax.Params) -> bool:
    """Whether no padding is needed."""
    pairs = zip(jax.tree.leaves(shardings), jax.tree.leaves(params), strict=True)
    return all(is_even(sharding, np.shape(param)) for sharding, param in pairs)


def resized(x: Any, shape: Shape) -> Any:
    """An array cut, or padded with zeros, along each axis to another shape."""
    if np.shape(x) == shape:
        return x
    x = x[tuple(map(slice, shape))]
    lacking = [(0, size - had) for size, had in zip(shape, x.shape, strict=True)]
    if not any(more for _, more in lacking):
        return x
    return np.pad(x, lacking) if isinstance(x, np.ndarray) else jnp.pad(x, lacking)


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """The arrays of a tree, placed as shardings say. None stays None, and a sharding of None places
    nothing.

    Outside jit, an array that a sharding does not divide is replicated.
    """
    return jax.tree.map(_placed, shardings, tree, is_leaf=lambda sharding: sharding is None)


def _placed(sharding: NamedSharding | None, x: Any) -> PyTree:
    if x is None or sharding is None:
        return x
    if not isinstance(x, jax.core.Tracer):
        even = is_even(sharding, np.shape(x))
        return jax.device_put(x, sharding if even else sharding.update(spec=PartitionSpec()))
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return lax.with_sharding_constraint(x, sharding)
    if AxisType.Auto in jax.sharding.get_abstract_mesh().axis_types:  # inside auto_axes
        return lax.with_sharding_constraint(x, sharding.spec)
    return jax.reshard(x, sharding)


def unfilled(state: optax.OptState, params: optax.Params, shardings: PyTree) -> optax.OptState:
    """A state whose arrays are cut to the shapes of their parameters."""

    def cut(x: Any, owner: int | None) -> Any:
        if owner is None or x.shape == shapes[owner]:
            return x
        if not isinstance(x, jax.core.Tracer):  # replicated, since shards differ in size
            x = jax.device_put(x, wanted[owner].update(spec=PartitionSpec()))
        return _placed(wanted[owner], resized(x, shapes[owner]))

    wanted = jax.tree.leaves(shardings)
    shapes = [np.shape(param) for param in jax.tree.leaves(params)]
    leaves, structure = jax.tree.flatten(state)
    found = owners(state, params, shardings)
    return jax.tree.unflatten(structure, map(cut, leaves, found))


def filled(state: optax.OptState, shardings: PyTree) -> optax.OptState:
    """A state padded and placed as the shardings require."""

    def fill(sharding: NamedSharding | None, x: Any) -> Any:
        if sharding is None or x is None:
            return x
        return _placed(sharding, resized(x, filled_shape(sharding, np.shape(x))))

    return jax.tree.map(fill, shardings, state, is_leaf=lambda sharding: sharding is None)


def inside_auto(f: Callable[..., Any], args: tuple[Any, ...], shardings: PyTree) -> Any:
    """Calls f where the axes of an Explicit mesh are Auto, and places its result.

    With Auto axes, the shards of an array may differ in size, and operands may be split in
    different ways, which an Explicit mesh refuses. Outside jit, auto_axes is not available.
    """
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(args)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        try:
            return f(*args)
        except Exception as error:
            error.add_note("On a mesh with Explicit axes, call zero1 inside jax.jit.")
            raise
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def of_arrays(arrays: dict[int, jax.Array]) -> Any:
        return f(*structure.unflatten(arrays.get(i, leaf) for i, leaf in enumerate(leaves)))

    return jax.sharding.auto_axes(of_arrays, out_sharding=shardings)(arrays)


def _with_axes(
    axes: Sequence[str], sharding: NamedSharding, shape: Shape, pad: bool
) -> NamedSharding:
    spec = mesh_axes(sharding, len(shape))
    if any(name in axes for names in spec for name in names) or not is_even(sharding, shape):
        return sharding
    sizes = {name: sharding.mesh.shape[name] for name in axes}
    more = division(part_of(sharding, shape), sizes, pad=pad)
    if not any(more):
        return sharding
    spec = [(*names, *others) for names, others in zip(spec, more, strict=True)]
    while not spec[-1]:  # as in the specs of jit's results
        spec.pop()
    entries = [names[0] if len(names) == 1 else names or None for names in spec]
    return sharding.update(spec=PartitionSpec(*entries))

"""Trees of shardings: of parameters, and of the arrays in a state that belong to them."""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import tree_leaves_with_path
import numpy as np
import optax

from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._types import PyTree
from rmsprop_jax.sharding._arguments import check_shardings
from rmsprop_jax.sharding._owners import owners


def shardings_of_params(shardings: PyTree, params: optax.Params) -> PyTree:
    """One sharding for each parameter, from a prefix of the tree of them."""
    check_shardings(shardings)
    return jax.tree.broadcast(shardings, params)


def shardings_of_state(
    state: optax.OptState, params: optax.Params, shardings: PyTree, others: NamedSharding | None
) -> PyTree:
    """One sharding for each array of a state: that of its parameter, or the others'.

    Of state and params only the structure and shapes count.
    """
    wanted = jax.tree.leaves(shardings)
    found = [others if owner is None else wanted[owner] for owner in owners(state, params)]
    return jax.tree.unflatten(jax.tree.structure(state), found)


def check_divided(params: optax.Params, shardings: PyTree) -> None:
    """Refuses shardings that do not divide their parameters."""
    wanted = jax.tree.leaves(shardings)
    for (path, param), sharding in zip(tree_leaves_with_path(params), wanted, strict=True):
        if not _divides(sharding, np.shape(param)):
            raise ValueError(
                f"parameter {leaf_name(path)!r} has the shape {np.shape(param)}, which "
                f"{sharding.spec} does not divide on a mesh of {dict(sharding.mesh.shape)}"
            )


def partition_over(axes: Sequence[str], params: optax.Params, shardings: PyTree) -> PyTree:
    """The shardings of parameters with more axes of the mesh, where they divide a shard.

    That is along its first axis that they divide. What has no such axis, or is split over them
    already, stays as it is.
    """

    def split(param: Any, sharding: NamedSharding) -> NamedSharding:
        return _with_axes(axes, sharding, np.shape(param))

    return jax.tree.map(split, params, shardings)


def axis_to_partition(shape: Sequence[int], n: int) -> int | None:
    """The first axis along which a shape divides in n parts, if those are several."""
    if n == 1 or 0 in shape:
        return None
    return next((axis for axis, size in enumerate(shape) if size % n == 0), None)


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """The arrays of a tree where they are to be; None stays, and where None is said, all stay."""
    return jax.tree.map(_placed, shardings, tree, is_leaf=lambda sharding: sharding is None)


def _placed(sharding: NamedSharding | None, x: Any) -> PyTree:
    if x is None or sharding is None:
        return x
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def _with_axes(
    axes: Sequence[str], sharding: NamedSharding, shape: tuple[int, ...]
) -> NamedSharding:
    sizes = sharding.mesh.shape
    spec = [_names(entry) for entry in sharding.spec]
    spec += [()] * (len(shape) - len(spec))
    if any(name in axes for names in spec for name in names) or not _divides(sharding, shape):
        return sharding
    shard = sharding.shard_shape(shape)
    axis = axis_to_partition(shard, math.prod(sizes[name] for name in axes))
    if axis is None:
        return sharding
    spec[axis] = (*spec[axis], *axes)
    while not spec[-1]:  # as jit writes the specs of its results
        spec.pop()
    entries = [names[0] if len(names) == 1 else names or None for names in spec]
    return sharding.update(spec=PartitionSpec(*entries))


def _divides(sharding: NamedSharding, shape: Sequence[int]) -> bool:
    """Whether a sharding has no more axes than a shape, and all shards are of one size."""
    parts = [math.prod(sharding.mesh.shape[n] for n in _names(entry)) for entry in sharding.spec]
    return len(parts) <= len(shape) and all(
        size % n == 0 for size, n in zip(shape, parts, strict=False)
    )


def _names(entry: Any) -> tuple[str, ...]:
    """The axes of the mesh in one entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)

"""How the leaves of a tree correspond to the arrays of another framework."""

from collections.abc import Collection, Iterable, Mapping
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._storage import is_packed
from rmsprop_jax._types import PyTree

Name = str | int


class Leaf(NamedTuple):
    """Where another framework keeps a leaf, and how it lays it out.

    Attributes:
      name: of the framework's array, or its number.
      axes: the permutation, as of ``np.transpose``, that turns the framework's array into ours;
        None for none.
      shape: the shape that the framework's array, a matrix, is given before its axes are permuted,
        and from which ours is then made flat; None for its own.
      part: (i, n, axis) for the i-th of n equal parts along an axis of the framework's array, as
        recurrent layers have them; None for the whole.
      also: names of arrays that are added to it in the framework, as the second bias of PyTorch's
        recurrent layers is. Their state is the same; a parameter is the sum, and shared out
        equally.
    """

    name: Name
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    part: tuple[int, int, int] | None = None
    also: tuple[Name, ...] = ()

    def names(self) -> tuple[Name, ...]:
        """All arrays that it is made of."""
        return (self.name, *self.also)


LeafMapping = Mapping[str, Leaf | Name]

_WHOLE = (0, 1, 0)  # as a part


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree, or its slots, by their path, as in "layer/kernel"."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_packed):
        if (name := leaf_name(path)) in leaves:
            raise ValueError(f"params must have different paths, got {name!r} for two leaves")
        leaves[name] = leaf
    return leaves


def resolve(
    mapping: LeafMapping, params: optax.Params, wanted: Collection[str] | None = None
) -> dict[str, Leaf]:
    """The mapping with every value a Leaf, which must name each leaf of params, and no other.

    Or each of those wanted; others may be named, too. What it names of the framework's arrays it
    must use wholly, and once.
    """
    paths = set(by_path(params))
    if missing := sorted(set(paths if wanted is None else wanted) - set(mapping)):
        raise ValueError(f"mapping must name every parameter: {missing} are missing")
    if unexpected := sorted(set(mapping) - paths):
        raise ValueError(f"mapping names {unexpected}, of which params has only {sorted(paths)}")
    leaves = {path: as_leaf(value) for path, value in mapping.items()}
    parts: dict[Name, dict[str, tuple[int, int, int]]] = {}
    for path, leaf in leaves.items():
        for name in leaf.names():
            parts.setdefault(name, {})[path] = leaf.part or _WHOLE
    for name, found in parts.items():
        _, count, axis = next(iter(found.values()))
        if sorted(found.values()) != [(i, count, axis) for i in range(count)]:
            raise ValueError(f"mapping must use {name!r} once, or each of its parts: got {found}")
    return leaves


def as_leaf(value: Any) -> Leaf:
    """A value of a mapping, with nothing but a name if it is only that."""
    leaf = value if isinstance(value, Leaf) else Leaf(value)
    if not isinstance(leaf.name, str | int) or isinstance(leaf.name, bool):
        raise TypeError(f"mapping must have a Leaf, a name or a number a path, got {value!r}")
    return leaf


def refuse_unmapped(
    names: Iterable[Name], leaves: Mapping[str, Leaf], wanted: Collection[str] | None = None
) -> None:
    """Refuses arrays that no leaf is mapped to, and leaves mapped to none, if they are wanted."""
    have, used = set(names), set(names_of(leaves.values()))
    wanted = leaves if wanted is None else wanted
    if missing := sorted(set(names_of(leaves[path] for path in wanted)) - have, key=str):
        raise ValueError(f"mapping names {missing}, of which there are only {_some(have)}")
    if unused := sorted(have - used, key=str):
        raise ValueError(f"mapping names nothing of {unused}")


def names_of(leaves: Iterable[Leaf]) -> list[Name]:
    """All arrays that leaves are made of, each once."""
    return list(dict.fromkeys(name for leaf in leaves for name in leaf.names()))


def take(array: np.ndarray, leaf: Leaf, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Of another framework's array, what a leaf of some shape is made of."""
    found = array
    if leaf.part is not None:
        index, count, axis = leaf.part
        if not -array.ndim <= axis < array.ndim or array.shape[axis] % count:
            raise ValueError(f"{what} has shape {array.shape}, not {count} parts on axis {axis}")
        found = np.split(found, count, axis)[index]
    try:
        if leaf.shape is not None:
            found = found.reshape(leaf.shape)
        if leaf.axes is not None:
            found = found.transpose(leaf.axes)
        if leaf.shape is not None:
            found = found.reshape(shape)
    except ValueError:
        fits = False
    else:
        fits = found.shape == tuple(shape) and (leaf.shape is None or array.ndim == 2)
    if not fits:
        raise ValueError(f"{what} has shape {array.shape}: by {leaf} it does not become {shape}")
    return found


def assembled(
    values: Mapping[str, np.ndarray], leaves: Mapping[str, Leaf]
) -> dict[Name, np.ndarray]:
    """The arrays of another framework, made of the values of all leaves: the inverse of take."""
    parts: dict[Name, dict[int, np.ndarray]] = {}
    along: dict[Name, tuple[int, int]] = {}
    for path, leaf in leaves.items():
        try:
            value = _undo(values[path], leaf)
        except (ValueError, IndexError):
            raise ValueError(f"{path!r} has shape {values[path].shape}: no {leaf}") from None
        index, count, axis = leaf.part or _WHOLE
        for name in leaf.names():
            parts.setdefault(name, {})[index] = value
            along[name] = count, axis
    for name, (count, _) in along.items():
        if len(parts[name]) != count:
            raise ValueError(f"there are {len(parts[name])} of the {count} parts of {name!r}")
    return {
        name: found[0] if count == 1 else np.concatenate([found[i] for i in range(count)], axis)
        for (name, found), (count, axis) in zip(parts.items(), along.values(), strict=True)
    }


def _undo(value: np.ndarray, leaf: Leaf) -> np.ndarray:
    if leaf.shape is not None:
        permuted = leaf.shape if leaf.axes is None else [leaf.shape[axis] for axis in leaf.axes]
        value = value.reshape(permuted)
    if leaf.axes is not None:
        value = value.transpose(np.argsort(leaf.axes))
    if leaf.shape is not None:
        # Of what it was before only the first axis is known: a matrix, as linear layers have it.
        value = value.reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
    return value


def _some(names: Iterable[Name]) -> list[Name]:
    return sorted(names, key=str)[:20]

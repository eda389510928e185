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
    """Where another framework stores a leaf, and in which layout.

    The framework's array is reshaped, cut into parts, permuted, and reshaped to the shape of ours.

    Attributes:
      name: name or number of the framework's array.
      axes: the permutation, as of ``np.transpose``, that turns the framework's array into ours;
        None for none.
      shape: the shape to which the framework's array is reshaped before it is cut and permuted;
        afterwards it is reshaped to ours. None for its own shape.
      part: (i, n, axis) for the i-th of n equal parts along an axis of the framework's array in the
        shape above, as in recurrent layers; None for the whole.
      also: names of arrays that the framework adds to this one, such as the second bias of
        PyTorch's recurrent layers, or a Leaf for one in another layout. They have the same state; a
        parameter is their sum, and is divided equally among them.
      original: the own shape of the framework's array if ``shape`` is another; None for a matrix
        with ``shape[0]`` rows, as in linear layers. In both shapes one number may be -1, for the
        rest.
    """

    name: Name
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    part: tuple[int, int, int] | None = None
    also: tuple["Name | Leaf", ...] = ()
    original: tuple[int, ...] | None = None

    def terms(self) -> tuple["Leaf", ...]:
        """Leaves of one array each, whose sum it is."""
        first = self._replace(also=())
        others = (x if isinstance(x, Leaf) else first._replace(name=x) for x in self.also)
        return (first, *(term for other in others for term in other.terms()))

    def names(self) -> tuple[Name, ...]:
        """The arrays that it consists of, one for each term."""
        return tuple(term.name for term in self.terms())


LeafMapping = Mapping[str, Leaf | Name]

_WHOLE = (0, 1, 0)  # as a part


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree, or its slots, by path such as "layer/kernel"."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_packed):
        if (name := leaf_name(path)) in leaves:
            raise ValueError(f"params must have different paths, got {name!r} for two leaves")
        leaves[name] = leaf
    return leaves


def resolve(
    mapping: LeafMapping, params: optax.Params, wanted: Collection[str] | None = None
) -> dict[str, Leaf]:
    """The mapping with every value as a Leaf; it must name each leaf of params, and no others.

    If wanted is given, it must name those, and may name other leaves of params. It must use each of
    the framework's arrays that it names completely, and once.
    """
    paths = set(by_path(params))
    if missing := sorted(set(paths if wanted is None else wanted) - set(mapping)):
        raise ValueError(f"mapping must name every parameter: {missing} are missing")
    if unexpected := sorted(set(mapping) - paths):
        raise ValueError(f"mapping names {unexpected}, but params has only {sorted(paths)}")
    leaves = {path: as_leaf(value) for path, value in mapping.items()}
    uses: dict[Name, list[tuple[str, Leaf]]] = {}
    for path, leaf in leaves.items():
        for term in leaf.terms():
            uses.setdefault(term.name, []).append((path, term))
    for name, found in uses.items():
        parts = [(path, term.part or _WHOLE) for path, term in found]
        _, count, axis = parts[0][1]
        if sorted(part for _, part in parts) != [(i, count, axis) for i in range(count)]:
            raise ValueError(f"mapping must use {name!r} once, or each of its parts: got {parts}")
        shapes = [(path, term.shape, term.original) for path, term in found]
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise ValueError(f"mapping must give {name!r} the same shapes everywhere: got {shapes}")
    return leaves


def as_leaf(value: Any) -> Leaf:
    """A value of a mapping as a Leaf, which has only a name if the value is one."""
    leaf = value if isinstance(value, Leaf) else Leaf(value)
    if any(not isinstance(n, str | int) or isinstance(n, bool) for n in leaf.names()):
        raise TypeError(f"mapping must have a Leaf, name or number for each path, got {value!r}")
    return leaf


def refuse_unmapped(
    names: Iterable[Name], leaves: Mapping[str, Leaf], wanted: Collection[str] | None = None
) -> None:
    """Refuses arrays without a leaf, and leaves without an array (only those wanted, if given)."""
    have, used = set(names), set(names_of(leaves.values()))
    wanted = leaves if wanted is None else wanted
    if missing := sorted(set(names_of(leaves[path] for path in wanted)) - have, key=str):
        raise ValueError(f"mapping names {missing}, but the source has only {_some(have)}")
    if unused := sorted(have - used, key=str):
        raise ValueError(f"mapping has no entry for {unused}")


def names_of(leaves: Iterable[Leaf]) -> list[Name]:
    """All arrays that leaves consist of, each once."""
    return list(dict.fromkeys(name for leaf in leaves for name in leaf.names()))


def take(array: np.ndarray, leaf: Leaf, shape: tuple[int, ...], what: str) -> np.ndarray:
    """The part of another framework's array that becomes a leaf of this shape (its first term).

    It is refused if :func:`assembled` would not invert this.
    """
    refusal = f"{what} has shape {array.shape}: by {leaf} it does not become {shape}"
    found = array
    try:
        if (shapes := _shapes(leaf)) is not None:
            found, own = (array.reshape(given) for given in shapes)
            if own.shape != array.shape:
                refusal = f"{what} has shape {array.shape}, not that of {leaf}: give it as original"
                raise ValueError
    except ValueError:
        raise ValueError(refusal) from None
    if leaf.part is not None:
        index, count, axis = leaf.part
        if not -found.ndim <= axis < found.ndim or found.shape[axis] % count:
            raise ValueError(f"{what} has shape {found.shape}, not {count} parts on axis {axis}")
        found = np.split(found, count, axis)[index]
    try:
        if leaf.axes is not None:
            found = found.transpose(leaf.axes)
        if shapes is not None:
            found = found.reshape(shape)
    except ValueError:
        raise ValueError(refusal) from None
    if found.shape != tuple(shape):
        raise ValueError(refusal)
    return found


def assembled(
    values: Mapping[str, np.ndarray], leaves: Mapping[str, Leaf]
) -> dict[Name, np.ndarray]:
    """The arrays of another framework, assembled from the values of all leaves: inverts take."""
    parts: dict[Name, dict[int, np.ndarray]] = {}
    terms: dict[Name, Leaf] = {}
    for path, leaf in leaves.items():
        for term in leaf.terms():
            try:
                value = _undo(values[path], term)
            except (ValueError, IndexError):
                raise ValueError(
                    f"{path!r} has shape {values[path].shape}, which does not match {leaf}"
                ) from None
            index, _, _ = term.part or _WHOLE
            parts.setdefault(term.name, {})[index] = value
            terms[term.name] = term
    return {name: _joined(parts[name], term) for name, term in terms.items()}


def _undo(value: np.ndarray, term: Leaf) -> np.ndarray:
    """A part of the framework's array, in the shape in which the array is cut."""
    ndim = value.ndim
    if (shapes := _shapes(term)) is not None:
        cut, ndim = list(shapes[0]), len(shapes[0])
        if term.part is not None:
            _, count, axis = term.part
            if cut[axis] >= 0:
                cut[axis], left = divmod(cut[axis], count)
                if left:
                    raise ValueError
        value = value.reshape(cut if term.axes is None else [cut[axis] for axis in term.axes])
    if term.axes is not None:
        order = np.arange(ndim)[list(term.axes)]
        if sorted(order) != list(range(ndim)):
            raise ValueError
        value = value.transpose(np.argsort(order))
    return value


def _joined(parts: Mapping[int, np.ndarray], term: Leaf) -> np.ndarray:
    """The framework's array, from all of its parts."""
    _, count, axis = term.part or _WHOLE
    if len(parts) != count:
        raise ValueError(f"there are {len(parts)} of the {count} parts of {term.name!r}")
    shapes = _shapes(term)
    try:
        whole = parts[0] if count == 1 else np.concatenate([parts[i] for i in range(count)], axis)
        return whole if shapes is None else whole.reshape(shapes[1])
    except ValueError:
        found = [part.shape for part in parts.values()]
        raise ValueError(f"parts of shapes {found} do not make {term.name!r}: {term}") from None


def _shapes(leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shape to which the framework's array is reshaped, and its own; None if not reshaped."""
    if leaf.original is not None:
        return leaf.original if leaf.shape is None else leaf.shape, leaf.original
    if leaf.shape is None:
        return None
    rows, *rest = leaf.shape
    return leaf.shape, (rows, -1 if min(rest, default=0) < 0 else math.prod(rest))


def _some(names: Iterable[Name]) -> list[Name]:
    return sorted(names, key=str)[:20]

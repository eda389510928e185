"""Which arrays of a state belong to which parameter."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.tree_util import tree_leaves_with_path
import numpy as np
import optax

from rmsprop_jax._rule import is_ours
from rmsprop_jax._storage import Joined, is_packed


def owners(state: optax.OptState, params: optax.Params) -> list[int | None]:
    """For each array of a state, the number of the parameter that it belongs to.

    It has the parameter's path, in the states of other transformations behind that of wrappers and
    fields, and its shape; or as many axes, in a field whose slots are more than arrays.
    """
    numbers = {path: number for number, (path, _) in enumerate(tree_leaves_with_path(params))}
    shapes = [np.shape(param) for param in jax.tree.leaves(params)]

    def owner(array: Any, paths: Sequence[Any], joined: bool) -> int | None:
        for number in map(numbers.get, paths):
            if number is not None:
                shape = shapes[number]
                if array.shape == shape or (joined and len(array.shape) == len(shape)):
                    return number
        return None

    return [owner(*found) for found in _arrays(state)]


def _arrays(state: optax.OptState) -> Iterator[tuple[Any, Sequence[Any], bool]]:
    """The arrays of a state, the paths that their parameter may have, and if they are Joined."""
    for path, node in tree_leaves_with_path(state, is_leaf=is_ours):
        if not is_ours(node):
            yield node, [path[start:] for start in range(len(path) + 1)], False
            continue
        for name, field in node._asdict().items():
            if isinstance(field, Joined):
                yield from _joined(field)
                continue
            for inner, array in tree_leaves_with_path(field):
                yield array, [inner] if name in _SLOTS else [], False


_SLOTS = ("nu", "mu", "trace")


def _joined(field: Any) -> Iterator[tuple[Any, Sequence[Any], bool]]:
    """Those of one field; what is there only to fill a place belongs to no parameter."""
    slots = dict(tree_leaves_with_path(field.slots(), is_leaf=is_packed))
    for (part, *inner), array in tree_leaves_with_path(field):
        path = tuple(inner)
        used = part.name not in field.shared and (is_packed(slots[path]) or array is slots[path])
        yield array, [path] if used else [], True

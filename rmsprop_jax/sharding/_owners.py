"""Which arrays of a state belong to which parameter."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any
import warnings

import jax
from jax.tree_util import tree_leaves_with_path
import numpy as np
import optax

from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._rule import is_ours
from rmsprop_jax._storage import Joined
from rmsprop_jax._types import PyTree
from rmsprop_jax.sharding._division import filled_shape


def owners(state: optax.OptState, params: optax.Params, shardings: PyTree) -> list[int | None]:
    """For each array of a state, the index of the parameter that it belongs to.

    Such an array has the parameter's path (in other transformations, after the path of wrappers and
    fields), and the parameter's shape, possibly padded for its sharding.
    """
    numbers = {path: number for number, (path, _) in enumerate(tree_leaves_with_path(params))}
    shapes = [
        {np.shape(param), filled_shape(sharding, np.shape(param))}
        for param, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    ]

    def owner(array: Any, paths: Sequence[Any]) -> int | None:
        for number in map(numbers.get, paths):
            if number is not None and array.shape in shapes[number]:
                return number
        return None

    return [owner(*found) for found in _arrays(state)]


def strays(state: optax.OptState, params: optax.Params, shardings: PyTree) -> list[str]:
    """The names of arrays that have a parameter's shape, but no parameter's path.

    A wrapper may also have such arrays for its own purposes, with an equal shape by chance.
    """
    paths = {path for path, _ in tree_leaves_with_path(params)}
    shapes = {np.shape(param) for param in jax.tree.leaves(params)} - {()}
    names = [leaf_name(path) for path, _ in tree_leaves_with_path(state)]
    found = zip(names, _arrays(state), owners(state, params, shardings), strict=True)
    return [
        name
        for name, (array, own), owner in found
        if owner is None and own and paths.isdisjoint(own) and np.shape(array) in shapes
    ]


def warn_of(names: Collection[str]) -> None:
    """Warns of arrays of a state that will not be split, although they may be parameters'."""
    if names:
        warnings.warn(
            "the state has arrays with the shapes of parameters, but not their paths, which will "
            f"be replicated on every device: {', '.join(names)}. If tx is optax.lookahead, whose "
            "parameters are pairs, put zero1 inside: optax.lookahead(zero1(...), ...)",
            stacklevel=3,
        )


def _arrays(state: optax.OptState) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The arrays of a state, and the paths that their parameter may have."""
    for path, node in tree_leaves_with_path(state, is_leaf=is_ours):
        if not is_ours(node):
            yield node, [path[start:] for start in range(len(path) + 1)]
            continue
        for name, field in node._asdict().items():
            if isinstance(field, Joined):
                for (part, *rest), array in tree_leaves_with_path(field):
                    yield array, [] if part.name in field.shared else [tuple(rest)]
                continue
            for inner, array in tree_leaves_with_path(field):
                yield array, [inner] if name in _SLOTS else []


_SLOTS = ("nu", "mu", "trace")

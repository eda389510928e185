"""Gradients, and what belongs to them: asserted by chex to fit, leaf by leaf."""

from collections.abc import Collection
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, tree_flatten_with_path
import optax

from rmsprop_jax._leaves import LeafType, describe, is_none, leaf_name, leaf_type
from rmsprop_jax._storage import is_packed
from rmsprop_jax._types import PyTree


class Gradients(NamedTuple):
    """The leaves of a tree of gradients, what they are, and the tree."""

    leaves: list[Any]
    types: list["LeafType | None"]
    structure: Any
    tree: PyTree


def gradients(tree: PyTree) -> Gradients:
    """The gradients of a step; None is one."""
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_none)
    types = [None if g is None else leaf_type(g) for g in leaves]
    return Gradients(leaves, types, structure, tree)


def without_float0(tree: PyTree) -> PyTree:
    """A tree of gradients with None where JAX gives float0, as for an integer parameter."""
    return jax.tree.map(lambda g: None if leaf_type(g).dtype == jax.dtypes.float0 else g, tree)


def counterparts(
    grads: Gradients,
    name: str,
    tree: PyTree,
    *,
    real: bool = False,
    dtypes: Collection[jnp.dtype] | None = None,
) -> list[Any]:
    """The leaves of a tree, asserted by chex to belong to the gradients.

    Each gradient that is not None must be floating or complex, and have its counterpart's shape. It
    must be complex where that is, unless the tree is real for either. The real dtype of a
    counterpart must be one of dtypes. What has no values to move has the gradient None, or float0
    as JAX gives it.
    """
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_slot)
    if structure != grads.structure:
        tree = structure.unflatten(map(_one_leaf, leaves))
        chex.assert_trees_all_equal_structs(
            grads.tree,
            tree,
            custom_message=f"gradients (tree 0) against {name} (tree 1): "
            + _difference(grads.tree, tree, name),
        )
    misfits = [
        i
        for i, (grad, other) in enumerate(zip(grads.types, leaves, strict=True))
        if grad is not None and not _belongs(grad, other, real, dtypes)
    ]
    _assert_none(misfits, grads, name, leaves)
    return leaves


def same_kinds(grads: Gradients, params: optax.Params) -> None:
    """Refuses, by chex, complex gradients of real parameters, and the reverse.

    Parameters of which nothing else is needed may be of another tree.
    """
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    if structure != grads.structure:
        return
    kinds = [None if grad is None else grad.kind for grad in grads.types]
    others = [leaf_type(leaf).kind for leaf in leaves]
    misfits = [
        i for i, pair in enumerate(zip(kinds, others, strict=True)) if len({*pair, None}) > 2
    ]
    _assert_none(misfits, grads, "params", leaves)


def _assert_none(misfits: list[int], grads: Gradients, name: str, leaves: list[Any]) -> None:
    """Has chex say which gradients are not what leaves of a name ask for, if there are some."""
    if not misfits:
        return
    names = _names(grads.tree)
    got = {names[i]: describe(grads.leaves[i]) for i in misfits}
    wanted = {names[i]: describe(_one_leaf(leaves[i])) for i in misfits}
    if left_out := [names[i] for i in misfits if leaves[i] is None]:
        chex.assert_trees_all_equal_structs(
            got,
            {names[i]: None if leaves[i] is None else "" for i in misfits},
            custom_message=f"gradients (tree 0) against {name} (tree 1): {left_out} must be "
            f"None, as there was nothing to train, got {[got[n] for n in left_out]}",
        )
    chex.assert_trees_all_equal_comparator(
        lambda *_: False, lambda grad, other: f"gradient {grad}, {name} {other}", got, wanted
    )


def _difference(grads: optax.Updates, tree: PyTree, name: str) -> str:
    """Where, and in what, the structure of gradients is not that of a tree."""
    got, wanted = set(_names(grads)), set(_names(tree))
    if got != wanted:
        return f"missing {sorted(wanted - got)}, unexpected {sorted(got - wanted)}"
    path, ours, theirs = _first_difference((), grads, tree)
    place = f"at {leaf_name(path)!r}" if path else "as a whole"
    other = " of another class, or with other data in it" if _node(ours) == _node(theirs) else ""
    return f"{place} the gradients have {_node(ours)}, {name} has {_node(theirs)}{other}"


def _first_difference(path: KeyPath, a: Any, b: Any) -> tuple[Any, Any, Any]:
    """The path to the first nodes of two trees that are not alike, and these."""
    inside = [tree_flatten_with_path(x, is_leaf=lambda y, x=x: y is not x)[0] for x in (a, b)]
    if type(a) is type(b) and [key for key, _ in inside[0]] == [key for key, _ in inside[1]]:
        for (key, x), (_, y) in zip(*inside, strict=True):
            structures: list[Any] = [jax.tree.structure(z, is_leaf=is_none) for z in (x, y)]
            if structures[0] != structures[1]:
                return _first_difference((*path, *key), x, y)
    return path, a, b


def _node(value: Any) -> str:
    """A node of a tree in words: its kind, and what it has inside."""
    if value is None or jax.tree_util.all_leaves([value]):
        return "a leaf"
    keys, _ = tree_flatten_with_path(value, is_leaf=lambda other: other is not value)
    return f"a {type(value).__name__} of {[leaf_name(key) for key, _ in keys]}"


def _belongs(grad: LeafType, slot: Any, real: bool, dtypes: Collection[jnp.dtype] | None) -> bool:
    other = leaf_type(slot)
    if grad.dtype == jax.dtypes.float0:
        return other.kind is None
    if grad.kind is None or other.kind is None or grad.shape != other.shape:
        return False
    if real:  # for either, unless it is held in few bits, as no slot of a complex parameter is
        is_small = is_packed(slot) or other.dtype.itemsize < 4
        right = other.kind is float and not (is_small and grad.kind is complex)
    else:
        right = other.kind is grad.kind
    return right and (dtypes is None or other.dtype in dtypes)


def _is_slot(leaf: Any) -> bool:
    return leaf is None or is_packed(leaf)


def _one_leaf(slot: Any) -> Any:
    """A slot, or what stands for it as a leaf if it is a node."""
    return jax.ShapeDtypeStruct(slot.shape, slot.dtype) if is_packed(slot) else slot


def _names(tree: PyTree) -> list[str]:
    paths, _ = tree_flatten_with_path(tree, is_leaf=is_none)
    return [leaf_name(path) for path, _ in paths]

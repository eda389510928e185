"""Gradients and the trees that must match them, which chex asserts leaf by leaf."""

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
    """The leaves of a tree of gradients, their types, the structure, and the tree itself."""

    leaves: list[Any]
    types: list["LeafType | None"]
    structure: Any
    tree: PyTree


def gradients(tree: PyTree) -> Gradients:
    """The gradients of a step. None counts as a leaf."""
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_none)
    types = [None if g is None else leaf_type(g) for g in leaves]
    return Gradients(leaves, types, structure, tree)


def without_float0(tree: PyTree) -> PyTree:
    """A tree of gradients with None where JAX gives float0, as it does for integer parameters."""
    return jax.tree.map(lambda g: None if leaf_type(g).dtype == jax.dtypes.float0 else g, tree)


def counterparts(
    grads: Gradients,
    name: str,
    tree: PyTree,
    *,
    real: bool = False,
    dtypes: Collection[jnp.dtype] | None = None,
) -> list[Any]:
    """The leaves of a tree, which chex asserts to match the gradients.

    Each gradient that is not None must be floating or complex, and have the shape of its
    counterpart. It must be complex exactly where the counterpart is, unless real says that the
    counterparts are real in either case. The real dtype of a counterpart must be one of dtypes.
    A leaf that is not trained has the gradient None, or float0 as JAX gives it.
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
    """Refuses, through chex, complex gradients of real parameters and real ones of complex ones.

    Params whose values are not needed may have another structure; they are not compared then.
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
    """Lets chex report which gradients do not match their leaf in the tree called name, if any."""
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
    """Where and how the structure of the gradients differs from that of a tree."""
    got, wanted = set(_names(grads)), set(_names(tree))
    if got != wanted:
        return f"missing {sorted(wanted - got)}, unexpected {sorted(got - wanted)}"
    path, ours, theirs = _first_difference((), grads, tree)
    place = f"at {leaf_name(path)!r}" if path else "at the root"
    other = " of another class, or with other static data" if _node(ours) == _node(theirs) else ""
    return f"{place} the gradients have {_node(ours)}, {name} has {_node(theirs)}{other}"


def _first_difference(path: KeyPath, a: Any, b: Any) -> tuple[Any, Any, Any]:
    """The path to the first nodes in which two trees differ, and these two nodes."""
    inside = [tree_flatten_with_path(x, is_leaf=lambda y, x=x: y is not x)[0] for x in (a, b)]
    if type(a) is type(b) and [key for key, _ in inside[0]] == [key for key, _ in inside[1]]:
        for (key, x), (_, y) in zip(*inside, strict=True):
            structures: list[Any] = [jax.tree.structure(z, is_leaf=is_none) for z in (x, y)]
            if structures[0] != structures[1]:
                return _first_difference((*path, *key), x, y)
    return path, a, b


def _node(value: Any) -> str:
    """Describes a node of a tree: its kind, and what it contains."""
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
    if real:  # for both kinds; but no slot of a complex parameter is held in few bits
        is_small = is_packed(slot) or other.dtype.itemsize < 4
        right = other.kind is float and not (is_small and grad.kind is complex)
    else:
        right = other.kind is grad.kind
    return right and (dtypes is None or other.dtype in dtypes)


def _is_slot(leaf: Any) -> bool:
    return leaf is None or is_packed(leaf)


def _one_leaf(slot: Any) -> Any:
    """A slot, or a leaf that stands for it if it is a node."""
    return jax.ShapeDtypeStruct(slot.shape, slot.dtype) if is_packed(slot) else slot


def _names(tree: PyTree) -> list[str]:
    paths, _ = tree_flatten_with_path(tree, is_leaf=is_none)
    return [leaf_name(path) for path, _ in paths]

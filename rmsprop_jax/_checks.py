"""What a caller may pass. Anything else is refused here, by name, before anything changes."""

from collections.abc import Collection
import functools
import math
import numbers
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, tree_flatten_with_path
import numpy as np
import optax

from rmsprop_jax._storage import Joined, is_packed
from rmsprop_jax._types import PyTree

LARGEST = float(np.finfo(np.float32).max)


# Of the numbers that have bounds, under the names that this library and others give them.
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("decay", "alpha", "rho", "gamma"), (0, 1)),
    **dict.fromkeys(("eps", "epsilon", "momentum", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("initial_scale", "lr"), (0, math.inf)),
}

_MAY_BE_NONE = ("momentum", "weight_decay")


def number(
    name: str, value: Any, bounds: tuple[float, float] | None = None, *, schedule: bool = True
) -> Any:
    """value, as a float if it is a Python or NumPy number, which must lie within its bounds.

    What a JAX array or a schedule will hold may not be known yet: those pass unread.
    """
    low, high = bounds or _BOUNDS.get(name, (-math.inf, math.inf))
    if schedule and callable(value):
        return value
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, got an array of shape {value.shape}")
        kinds = (jnp.inexact if isinstance(value, jax.Array) else jnp.floating, jnp.integer)
        if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
            raise TypeError(f"{name} must be a real number, got dtype {value.dtype}")
        if isinstance(value, jax.Array):
            return value
        value = value.item()
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        wanted = "a number, a scalar array or a schedule"
        wanted = wanted if schedule else "a number or scalar array"
        or_none = ", or None for none" if name in _MAY_BE_NONE else ""
        raise TypeError(f"{name} must be {wanted}{or_none}, got {value!r}")
    if not (low <= value <= high and abs(value) <= LARGEST):
        upper = "<= " + f"{high:g}" if high < math.inf else "finite in float32"
        lower = f">= {low:g} and " if low > -math.inf else ""
        raise ValueError(f"{name} must be {lower}{upper}, got {value!r}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """value, which must be a Python or NumPy bool: the structure of the rule depends on it."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def is_trained(path: KeyPath, param: Any) -> bool:
    """Whether a parameter has real or complex values to move; integers, bools and keys have not."""
    if _type(param).kind is not None:
        return True
    dtype = getattr(param, "dtype", None)
    kinds = (jnp.integer, np.bool_, jax.dtypes.extended)
    if isinstance(param, int) or any(dtype and jnp.issubdtype(dtype, kind) for kind in kinds):
        return False
    raise TypeError(
        f"parameter {leaf_name(path)!r} must be floating or complex, or have no gradient as an "
        f"integer, got {_describe(param)}; leave it out with optax.masked or optax.partition"
    )


def instance(name: str, value: Any, protocol: type) -> Any:
    """value, which must have the methods of a protocol."""
    if not isinstance(value, protocol) or callable(value):
        raise TypeError(f"{name} must be a {protocol.__name__}, got {value!r}")
    return value


def state(value: Any, kind: Any, in_use: dict[str, bool], joins: Collection[str]) -> None:
    """Refuses what is not a state of a kind, or one whose fields in use, or joined, are others."""
    if not isinstance(value, kind):
        raise TypeError(f"state must be of type {kind.__name__}, got {type(value).__name__}")
    for field, used in in_use.items():
        # Where the parameters are None as a whole, so are all slots.
        if (getattr(value, field) is not None) != used and value.nu is not None:
            raise ValueError(
                f"state.{field} must {'not ' if used else ''}be None: this state was made by a "
                "transformation with other arguments"
            )
    for field in ("nu", "mu", "trace"):
        held = getattr(value, field)
        if held is not None and isinstance(held, Joined) != (field in joins):
            raise TypeError(
                f"state.{field} must be of this storage, got {type(held).__name__}: "
                "convert.change_storage gives the state of another one"
            )


class Gradients(NamedTuple):
    """The leaves of a tree of gradients, what they are, and the tree."""

    leaves: list[Any]
    types: list["_Type | None"]
    structure: Any
    tree: PyTree


def gradients(tree: PyTree) -> Gradients:
    """The gradients of a step; None is one."""
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_none)
    types = [None if g is None else _type(g) for g in leaves]
    return Gradients(leaves, types, structure, tree)


def without_float0(tree: PyTree) -> PyTree:
    """A tree of gradients with None where JAX gives float0, as for an integer parameter."""
    return jax.tree.map(lambda g: None if _type(g).dtype == jax.dtypes.float0 else g, tree)


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
    if misfits:
        names = _names(grads.tree)
        got = {names[i]: _describe(grads.leaves[i]) for i in misfits}
        wanted = {names[i]: _describe(_one_leaf(leaves[i])) for i in misfits}
        if left_out := [names[i] for i in misfits if leaves[i] is None]:
            chex.assert_trees_all_equal_structs(
                got,
                {names[i]: None if leaves[i] is None else "" for i in misfits},
                custom_message=f"gradients (tree 0) against {name} (tree 1): {left_out} must be "
                f"None, as there was nothing to train, got {[got[n] for n in left_out]}",
            )
        _assert_equal(got, wanted, name)
    return leaves


def same_kinds(grads: Gradients, params: optax.Params) -> None:
    """Refuses, by chex, complex gradients of real parameters, and the reverse.

    Parameters of which nothing else is needed may be of another tree.
    """
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(params, is_leaf=_is_none)
    if structure != grads.structure:
        return
    kinds = [None if grad is None else grad.kind for grad in grads.types]
    others = [_type(leaf).kind for leaf in leaves]
    misfits = [
        i for i, pair in enumerate(zip(kinds, others, strict=True)) if len({*pair, None}) > 2
    ]
    if misfits:
        names = _names(grads.tree)
        got = {names[i]: _describe(grads.leaves[i]) for i in misfits}
        _assert_equal(got, {names[i]: _describe(leaves[i]) for i in misfits}, "params")


def _assert_equal(got: dict[str, str], wanted: dict[str, str], name: str) -> None:
    """Has chex say that gradients of some names are not what they must be."""
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
            structures: list[Any] = [jax.tree.structure(z, is_leaf=_is_none) for z in (x, y)]
            if structures[0] != structures[1]:
                return _first_difference((*path, *key), x, y)
    return path, a, b


def _node(value: Any) -> str:
    """A node of a tree in words: its kind, and what it has inside."""
    if value is None or jax.tree_util.all_leaves([value]):
        return "a leaf"
    keys, _ = tree_flatten_with_path(value, is_leaf=lambda other: other is not value)
    return f"a {type(value).__name__} of {[leaf_name(key) for key, _ in keys]}"


class _Type(NamedTuple):
    """Of a leaf: its shape, float or complex, and the dtype of its real numbers.

    None for what it has not.
    """

    shape: tuple[int, ...] | None
    kind: type | None
    dtype: Any


def _type(leaf: Any) -> _Type:
    if hasattr(leaf, "dtype"):
        return _Type(leaf.shape, *_kind(leaf.dtype))
    if isinstance(leaf, float | complex):
        return _Type((), type(leaf), jnp.dtype(float))
    return _Type(None, None, None)


def _belongs(grad: _Type, slot: Any, real: bool, dtypes: Collection[jnp.dtype] | None) -> bool:
    other = _type(slot)
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


_UNSIGNED = jnp.dtype(jnp.float8_e8m0fnu)  # has neither 0 nor negative numbers


@functools.cache
def _kind(dtype: Any) -> tuple[type | None, Any]:
    if not jnp.issubdtype(dtype, jnp.inexact) or dtype == _UNSIGNED:
        return None, dtype
    kind = complex if jnp.issubdtype(dtype, jnp.complexfloating) else float
    return kind, jnp.finfo(dtype).dtype


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _is_slot(leaf: Any) -> bool:
    return leaf is None or is_packed(leaf)


def _one_leaf(slot: Any) -> Any:
    """A slot, or what stands for it as a leaf if it is a node."""
    return jax.ShapeDtypeStruct(slot.shape, slot.dtype) if is_packed(slot) else slot


def _describe(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return f"{leaf!r} of type {type(leaf).__name__}"
    if leaf.dtype == jax.dtypes.float0:
        return f"float0{list(leaf.shape)}"
    return f"{leaf.dtype}{list(leaf.shape)}"


def _names(tree: PyTree) -> list[str]:
    paths, _ = tree_flatten_with_path(tree, is_leaf=_is_none)
    return [leaf_name(path) for path, _ in paths]


_WRAPPED = jax.tree_util.GetAttrKey("value")


def leaf_name(path: KeyPath) -> str:
    """A leaf's place in its tree, as "layer/kernel"; "" for a tree that is one leaf.

    What Flax NNX wraps an array in is not part of it.
    """
    if path and path[-1] == _WRAPPED:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")

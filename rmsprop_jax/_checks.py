"""What a caller may pass. Anything else is refused here, by name, before anything changes."""

from collections.abc import Collection
import functools
import math
import numbers
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._storage import Joined, is_packed

LARGEST = float(np.finfo(np.float32).max)


# Of the numbers that have bounds, under the names that this library and others give them.
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("decay", "alpha", "rho", "gamma"), (0, 1)),
    **dict.fromkeys(("eps", "epsilon", "momentum", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("initial_scale", "lr"), (0, math.inf)),
}


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
        if not any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer)):
            raise TypeError(f"{name} must be a real number, got dtype {value.dtype}")
        if isinstance(value, jax.Array):
            return value
        value = value.item()
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        kinds = "a number, a scalar array or a schedule" if schedule else "a number or scalar array"
        raise TypeError(f"{name} must be {kinds}, got {value!r}")
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


def parameter(path: Any, param: Any) -> None:
    """Refuses a parameter that has no real or complex values to move."""
    if _form(param).kind is None:
        raise TypeError(
            f"parameter {leaf_name(path)!r} must be floating or complex, got {_describe(param)}; "
            "leave it out with optax.masked or optax.partition"
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


def columns(
    grads: Any, trees: dict[str, Any], *, real: Collection[str], dtypes: Collection[Any]
) -> tuple[list[list[Any]], Any]:
    """The leaves of the gradients and of each tree, asserted by chex to belong together.

    Beside them, the structure of the gradients.

    None is a leaf, and a tree that is None has nothing but such. Each gradient that is not None
    must be floating or complex, have the shapes of its counterparts and be complex where they
    are; the trees named in real are real for either. The real dtype of a slot must be one of
    dtypes.
    """
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(grads, is_leaf=_is_none)
    forms = [None if grad is None else _form(grad) for grad in leaves]
    found = [leaves]
    for name, tree in trees.items():
        if tree is None:
            found.append([None] * len(leaves))
            continue
        others: list[Any]
        other_structure: Any
        others, other_structure = jax.tree.flatten(tree, is_leaf=_is_slot)
        if other_structure != structure:
            tree = other_structure.unflatten(map(_one_leaf, others))
            got, wanted = set(_names(grads)), set(_names(tree))
            chex.assert_trees_all_equal_structs(
                grads,
                tree,
                custom_message=f"gradients (tree 0) against {name} (tree 1): "
                f"missing {sorted(wanted - got)}, unexpected {sorted(got - wanted)}",
            )
        misfits = [
            i
            for i, (form, other) in enumerate(zip(forms, others, strict=True))
            if form is not None
            and not _fits(form, _form(other), name in real, None if name == "params" else dtypes)
        ]
        if misfits:
            names = _names(grads)
            chex.assert_trees_all_equal_comparator(
                lambda *_: False,
                lambda grad, other, name=name: (
                    f"gradient {_describe(grad)}, {name} {_describe(other)}"
                ),
                {names[i]: leaves[i] for i in misfits},
                {names[i]: _one_leaf(others[i]) for i in misfits},
            )
        found.append(others)
    return found, structure


class _Form(NamedTuple):
    """Of a leaf: its shape, float or complex, and the dtype of its real numbers.

    None for what it has not.
    """

    shape: tuple[int, ...] | None
    kind: type | None
    dtype: Any


def _form(leaf: Any) -> _Form:
    if hasattr(leaf, "dtype"):
        return _Form(leaf.shape, *_kind(leaf.dtype))
    if isinstance(leaf, float | complex):
        return _Form((), type(leaf), jnp.dtype(float))
    return _Form(None, None, None)


def _fits(grad: _Form, other: _Form, real: bool, dtypes: Collection[Any] | None) -> bool:
    if grad.kind is None or other.kind is None or grad.shape != other.shape:
        return False
    right = other.kind is (float if real else grad.kind)
    return right and (dtypes is None or other.dtype in dtypes)


@functools.cache
def _kind(dtype: Any) -> tuple[type | None, Any]:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return None, None
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
    return f"{leaf.dtype}{list(leaf.shape)}"


def _names(tree: Any) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
    return [leaf_name(path) for path, _ in paths]


_WRAPPED = jax.tree_util.GetAttrKey("value")


def leaf_name(path: Any) -> str:
    """A leaf's place in its tree, as "layer/kernel"; "" for a tree that is one leaf.

    What Flax NNX wraps an array in is not part of it.
    """
    if path and path[-1] == _WRAPPED:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")

"""What a caller may pass. Anything else is refused here, by name, before anything changes."""

import math
import numbers
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

LARGEST = float(np.finfo(np.float32).max)


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    schedule: bool = True,
) -> Any:
    """value, as a float if it is a Python or NumPy number, which must lie within the bounds.

    What a JAX array or a schedule will hold may not be known yet: those pass unread.
    """
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
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
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
    if not _is_inexact(param):
        raise TypeError(
            f"parameter {name(path)!r} must be floating or complex, got {_describe(param)}; "
            "leave it out with optax.masked or optax.partition"
        )


def instance(name: str, value: Any, protocol: type) -> Any:
    """value, which must have the methods of a protocol."""
    if not isinstance(value, protocol) or callable(value):
        raise TypeError(f"{name} must be a {protocol.__name__}, got {value!r}")
    return value


def state(value: Any, kind: type, in_use: dict[str, bool]) -> None:
    """Refuses what is not a state of a kind, or one whose fields in use are others."""
    if not isinstance(value, kind):
        raise TypeError(f"state must be a {kind.__name__}, got {type(value).__name__}")
    for field, used in in_use.items():
        if (getattr(value, field) is not None) != used and value.nu is not None:
            raise ValueError(
                f"state.{field} must {'not ' if used else ''}be None: this state was made by a "
                "transformation with other arguments"
            )


def beside(grads: Any, tree: Any, name: str, *, real: bool = False) -> list[Any]:
    """The leaves of tree, asserted to be what the gradients call for; None counts as a leaf.

    Each gradient that is not None must be floating or complex, have the shape of its
    counterpart and, unless the tree is real whatever the gradients are, be complex where that is.
    """

    def fits(grad: Any, leaf: Any) -> bool:
        return (
            _is_inexact(grad)
            and jnp.shape(grad) == jnp.shape(leaf)
            and (real or jnp.iscomplexobj(grad) == jnp.iscomplexobj(leaf))
        )

    wanted, wanted_structure = jax.tree.flatten(tree, is_leaf=_is_none)
    got, structure = jax.tree.flatten(grads, is_leaf=_is_none)
    if structure != wanted_structure:
        names, wanted_names = set(_names(grads)), set(_names(tree))
        chex.assert_trees_all_equal_structs(
            grads,
            tree,
            custom_message=f"gradients (tree 0) against {name} (tree 1): "
            f"missing {sorted(wanted_names - names)}, unexpected {sorted(names - wanted_names)}",
        )
    pairs = zip(got, wanted, strict=True)
    misfits = [
        i
        for i, (grad, leaf) in enumerate(pairs)
        if grad is not None and (leaf is None or not fits(grad, leaf))
    ]
    if misfits:
        names = _names(grads)
        chex.assert_trees_all_equal_comparator(
            fits,
            lambda grad, leaf: f"gradient {_describe(grad)}, {name} {_describe(leaf)}",
            {names[i]: got[i] for i in misfits},
            {names[i]: wanted[i] for i in misfits},
        )
    return wanted


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _is_inexact(leaf: Any) -> bool:
    if isinstance(leaf, float | complex):
        return True
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _describe(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return f"{leaf!r} of type {type(leaf).__name__}"
    return f"{leaf.dtype}{list(leaf.shape)}"


def _names(tree: Any) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
    return [name(path) for path, _ in paths]


def name(path: Any) -> str:
    """A leaf's place in its tree, as "layer/kernel"; "" for a tree that is one leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")

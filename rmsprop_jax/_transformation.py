"""How this library builds a transformation, and when two of them are equal.

User programs put transformations into train states, copies and files, and compare them with
``==``. So transformations with equal parts are equal, and so are copies. ``init`` and ``update``
close over their part, a pytree in which programs find the arrays to trace.
"""

import types
from typing import Any
import weakref

import jax
import optax

from rmsprop_jax._asking import Part, report
from rmsprop_jax._schedule import Schedule


class Transformation(optax.GradientTransformationExtraArgs):  # type: ignore[misc] # untyped
    """The ``init`` and ``update`` of a part."""

    @property
    def part(self) -> Part | None:
        """The part that both functions belong to; None if one of them was replaced."""
        is_one = getattr(self.update, "init", None) is self.init
        return getattr(self.update, "part", None) if is_one else None

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions inside functions cannot be pickled.
        if self.part is None:
            return optax.GradientTransformationExtraArgs, tuple(self)
        return transformation, (self.part,)

    def __copy__(self) -> "Transformation":
        return self

    def __deepcopy__(self, memo: Any) -> "Transformation":
        return self


def transformation(part: Part) -> Transformation:
    """The transformation of a part. Equal parts share the same functions while these are alive."""

    def init(params: optax.Params) -> optax.OptState:
        state = part.init(params)
        report(part, state)
        return state

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        report(part)
        return part.update(updates, state, params, **extra_args)

    one: Any = update
    one.part, one.init = part, init
    one = _UPDATES.setdefault(_Identity(part), one)
    return Transformation(one.init, one)


_UPDATES: weakref.WeakValueDictionary["_Identity", Any] = weakref.WeakValueDictionary()


class _Identity:
    """Identifies a part: equal for equal parts. Opaque values must be the same object."""

    def __init__(self, part: Part) -> None:
        leaves, structure = jax.tree.flatten(part, is_leaf=_is_opaque)
        self.found: Any = (type(part), structure, *map(_leaf_identity, leaves))
        try:
            self.hash = hash(self.found)
        except Exception:  # whatever a foreign object raises
            self.found = _Same(part)
            self.hash = hash(self.found)

    def __eq__(self, other: object) -> bool:
        try:
            return isinstance(other, _Identity) and bool(self.found == other.found)
        except Exception:  # the same
            return False

    def __hash__(self) -> int:
        return self.hash


class _Same:
    """Equal only to a wrapper of the same object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _is_opaque(value: Any) -> bool:
    """Whether a value must not be looked into: schedules of others may be mutable."""
    return callable(value) and not isinstance(value, Schedule)


def _leaf_identity(leaf: Any) -> Any:
    if isinstance(leaf, float):
        return leaf.hex()  # -0 is not 0
    if isinstance(leaf, types.MethodType):  # a new object at each lookup
        return leaf
    # The values of arrays may not be known yet.
    return _Same(leaf) if isinstance(leaf, jax.Array) or callable(leaf) else (type(leaf), leaf)

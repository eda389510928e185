"""Helpers for the arguments of all dialects."""

from collections.abc import Callable
import numbers
from typing import Any

import jax

from rmsprop_jax import _checks
from rmsprop_jax._schedule import Schedule, real
from rmsprop_jax._types import ScalarOrSchedule


def checked(**arguments: Any) -> list[Any]:
    """The arguments, checked under the names that their framework gives them.

    A schedule becomes one that checks its values under that name, too.
    """
    return [_checked(name, value) for name, value in arguments.items()]


def unless_0(value: Any) -> Any:
    """value, or None if it is the number 0, which stands for an absent term."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return None if is_number and value == 0 else value


def at(value: ScalarOrSchedule, count: jax.Array) -> Any:
    """The value of a number, array or schedule after count steps."""
    return real(value(count) if callable(value) else value)


def refuse_int(name: str, value: Any) -> None:
    """Refuses an int for a learning rate, as some frameworks do."""
    if isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a float, not an int, got {value!r}")


def _checked(name: str, value: Any) -> Any:
    return Schedule(_checked_at, (name, value)) if callable(value) else _checks.number(name, value)


def _checked_at(count: jax.Array, name: str, schedule: Callable[[jax.Array], Any]) -> Any:
    return _checks.number(name, schedule(count), schedule=False)

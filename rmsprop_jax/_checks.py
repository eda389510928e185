"""What a caller may pass. Anything else is refused here, by name, before anything changes."""

from collections.abc import Collection
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
import numpy as np

from rmsprop_jax._leaves import describe, leaf_name, leaf_type
from rmsprop_jax._storage import Joined

LARGEST = float(np.finfo(np.float32).max)


# The bounds of numbers, under the names that this library and others give them.
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("decay", "alpha", "rho", "gamma"), (0, 1)),
    **dict.fromkeys(("eps", "epsilon", "momentum", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("initial_scale", "lr"), (0, math.inf)),
}

_MAY_BE_NONE = ("momentum", "weight_decay")


def number(
    name: str, value: Any, bounds: tuple[float, float] | None = None, *, schedule: bool = True
) -> Any:
    """value, as a float if it is a Python or NumPy number, which must be within its bounds.

    JAX arrays and schedules pass unchecked, since their values may not be known yet.
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


def integer(name: str, value: Any, low: int | None = None) -> int:
    """value, which must be an integer, and at least low."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """value, which must be a Python or NumPy bool: the structure of the rule depends on it."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def is_trained(path: KeyPath, param: Any) -> bool:
    """Whether a parameter is real or complex, and so trained; integers, bools and keys are not."""
    if leaf_type(param).kind is not None:
        return True
    dtype = getattr(param, "dtype", None)
    kinds = (jnp.integer, np.bool_, jax.dtypes.extended)
    if isinstance(param, int) or any(dtype and jnp.issubdtype(dtype, kind) for kind in kinds):
        return False
    raise TypeError(
        f"parameter {leaf_name(path)!r} must be floating or complex, or have no gradient as an "
        f"integer, got {describe(param)}; leave it out with optax.masked or optax.partition"
    )


def instance(name: str, value: Any, protocol: type) -> Any:
    """value, which must have the methods of a protocol."""
    if not isinstance(value, protocol) or callable(value):
        raise TypeError(f"{name} must be a {protocol.__name__}, got {value!r}")
    return value


def state(value: Any, kind: Any, in_use: dict[str, bool], joins: Collection[str]) -> None:
    """Refuses a value that is not a state of this kind, or has other fields in use or joined."""
    if not isinstance(value, kind):
        raise TypeError(f"state must be of type {kind.__name__}, got {type(value).__name__}")
    for field, used in in_use.items():
        # If the parameters are None as a whole, so are all slots.
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
                "convert.change_storage converts the state of another one"
            )
        if isinstance(held, Joined):
            held.check(field)

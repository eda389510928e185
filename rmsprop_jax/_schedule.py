"""Hyperparameters that a step of the count, and of other hyperparameters, makes."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


def real(value: Any) -> Any:
    """A scalar array as a real number of a floating dtype; anything else as it is.

    ``optax.inject_hyperparams`` makes complex arrays of all numbers if a parameter is complex, and
    integers times a count overflow.
    """
    if not isinstance(value, jax.Array):
        return value
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        return value.real
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arguments"], meta_fields=["function"]
)
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A schedule that is equal to those of the same function and arguments, which a closure is not.

    Attributes:
      function: of the number of earlier steps and the arguments.
      arguments: numbers, arrays and other schedules.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, count: jax.Array) -> Any:
        return self.function(count, *map(real, self.arguments))

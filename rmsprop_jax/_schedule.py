"""Hyperparameters computed from the step count and from other hyperparameters."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


def real(value: Any) -> Any:
    """A scalar array as a real number of a floating dtype; anything else unchanged.

    ``optax.inject_hyperparams`` makes all numbers complex arrays if a parameter is complex, and
    an integer times a count can overflow.
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
    """A schedule that equals others of the same function and arguments, unlike a closure.

    Attributes:
      function: takes the number of earlier steps, and the arguments.
      arguments: numbers, arrays and other schedules.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, count: jax.Array) -> Any:
        return self.function(count, *map(real, self.arguments))

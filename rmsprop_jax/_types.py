"""Names for types that Python's type system cannot tell apart."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any  # of arrays, or of one value per array: a sharding, a slot, a name
Scalar = float | jax.Array
ScalarOrSchedule = Scalar | Callable[[jax.Array], Any]
Hyperparameter = Any  # one of these, or None; within a step, an array or None

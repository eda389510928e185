"""Names for what the type system of Python cannot tell apart."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any  # of arrays, or of what stands for each of them: a sharding, a slot, a name
Scalar = float | jax.Array
ScalarOrSchedule = Scalar | Callable[[jax.Array], Any]
Hyperparameter = Any  # one of these, or None; in a step an array, or None

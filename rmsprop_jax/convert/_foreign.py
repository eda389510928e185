"""The state that other frameworks keep for an array, and values it cannot have."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rmsprop_jax.convert._arrays import wide
from rmsprop_jax.convert._mapping import Name

_ROUNDING = 1e-6  # relative to the largest number; a negative number above this counts as 0


class Entry(NamedTuple):
    """The state that a framework keeps for one array; None for slots that it does not have.

    Attributes:
      nu: second moment of the gradient, never its variance.
      mu: mean of the gradient.
      trace: momentum buffer; the parameters move against it.
    """

    nu: np.ndarray
    mu: np.ndarray | None = None
    trace: np.ndarray | None = None


class Foreign(NamedTuple):
    """The whole state that a framework keeps.

    Attributes:
      entries: by name; None for an array that has not taken a step.
      steps: number of steps taken.
      lr_in_momentum: whether the buffers contain the learning rate.
      weight_sum: the number by which nu and mu are to be divided, if they are biased.
      idle_momentum: whether there are buffers even without momentum.
    """

    entries: Mapping[Name, Entry | None]
    steps: int
    lr_in_momentum: bool
    weight_sum: float | None = None
    idle_momentum: bool = False


def refuse_impossible(name: Name, entry: Entry | None) -> None:
    """Refuses what no gradients can produce, as from other arrays or from a run that diverged."""
    if entry is None:
        return
    for field, value in entry._asdict().items():
        if value is not None and not np.all(np.isfinite(wide(value))):
            raise ValueError(f"{field} of {name!r} has numbers that are not finite")
    v = wide(entry.nu)
    if np.any(low := np.minimum(v.real, v.imag) < -_ROUNDING * np.max(abs(v), initial=0)):
        raise ValueError(f"nu of {name!r} is a second moment, but contains {v[low][0]}")

"""Test losses of methods that start from the same parameters and see the same batches.

A method trains like the reference if the 95% interval of its relative difference, by Student's t
over the seeds, lies within the margin. The margin has two sides, so a method with a lower loss
can fail: its steps are not those of the reference.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

import _results
from _tasks import Params, Task

MARGIN = 0.03
SEEDS = range(10, 30)  # lower ones were used to choose learning rates

# Maps parameters, state, training data and indices of a batch to parameters and state.
Step = Callable[[Params, Any, Any, Any], tuple[Params, Any]]


def trained(task: Task, seed: int, params: Params, state: Any, step: Step) -> tuple[Params, Any]:
    """Parameters and state after the last step, on batches that the seed determines."""
    rng = np.random.default_rng(seed)
    rows = jax.device_put(task.train)
    batches = rng.integers(len(rows[0]), size=(task.steps, task.batch), dtype=np.int32)
    for picked in batches:
        params, state = step(params, state, rows, picked)
    return params, state


class Difference(NamedTuple):
    """A mean relative difference, and its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def small(self) -> bool:
        """Whether the whole interval lies within the margin."""
        return self.low > -MARGIN and self.high < MARGIN


def difference(losses: ArrayLike, reference: ArrayLike) -> Difference:
    """The difference between paired losses, by Student's t over the pairs."""
    ratios = np.asarray(losses) / np.asarray(reference) - 1
    mean = float(ratios.mean())
    error = float(ratios.std(ddof=1)) / len(ratios) ** 0.5
    half = float(stats.t.ppf(0.975, len(ratios) - 1)) * error
    return Difference(mean, mean - half, mean + half)


def columns(losses: NDArray[Any], reference: NDArray[Any], against: str) -> _results.Row:
    """The last columns of a row; blank for the reference itself."""
    itself = losses is reference
    found = difference(losses, reference)
    return {
        "test loss (± sd over seeds)": f"{losses.mean():.4g} ± {losses.std(ddof=1):.1g}",
        f"against {against}": "" if itself else f"{found.mean:+.2%}",
        "95% interval": "" if itself else f"{found.low:+.2%} to {found.high:+.2%}",
        f"within {MARGIN:.0%}": "" if itself else "yes" if found.small else "no",
    }

"""Two things timed alternately, with medians, so that a drift of the machine affects both."""

from collections.abc import Callable, Sequence
import statistics
import time
from typing import Any, NamedTuple

import jax


class Pair(NamedTuple):
    """Median seconds of each side, median and quartiles of the ratio ours / theirs."""

    theirs: float
    ours: float
    ratio: float
    quartiles: tuple[float, float]

    def per(self, steps: int) -> "Pair":
        """Seconds per step, where each call makes this many steps."""
        return self._replace(theirs=self.theirs / steps, ours=self.ours / steps)

    def columns(self) -> dict[str, str]:
        low, high = self.quartiles
        return {"ratio": f"{self.ratio:.2f}", "quartiles": f"{low:.2f} to {high:.2f}"}


def nothing() -> None:
    """What runs before a call by default."""


def compare(
    sides: Sequence[Callable[[], Any]],
    pairs: int,
    warm_up: int = 2,
    before: Callable[[], None] = nothing,
) -> Pair:
    """Times theirs and ours alternately after a warm-up; they take turns going first.

    ``before`` runs before each call and is not timed.
    """
    for side in warm_up * [*sides]:
        jax.block_until_ready(side())
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for i in (0, 1) if pair % 2 else (1, 0):
            before()
            start = time.perf_counter()
            jax.block_until_ready(sides[i]())
            seconds[i].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if pairs > 1 else 3 * ratios
    theirs, ours = (statistics.median(s) for s in seconds)
    return Pair(theirs, ours, statistics.median(ratios), (low, high))

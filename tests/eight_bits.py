"""``low_memory.q8``, its numbers and its rounding, implemented again in NumPy from the definition.

Every element has a place on a grid. A value to be stored lies between two neighbours on the grid
and becomes one of them, with the probability that makes the mean correct.
"""

from typing import NamedTuple

import numpy as np

TINY = 2.0**-126


class Format(NamedTuple):
    """Numbers an octave, the code of 1, and the exponent of code 1 where codes are powers of 2."""

    steps: int
    one: int
    power: int


FORMATS = {"uint8": Format(4, 180, -126), "int8": Format(8, 96, -90)}


class Choice(NamedTuple):
    """For each number the two that it may become, and the probability of the larger."""

    low: np.ndarray
    high: np.ndarray
    chance: np.ndarray


def grid(dtype, scale):
    """The numbers of the codes 0, 1, 2, ... under a scale, in float64."""
    codes = np.arange(256 if dtype == "uint8" else 128)
    steps, one, power = FORMATS[dtype]
    if scale > 0:
        octaves, places = np.divmod(codes - one, steps)
        numbers = np.float64(scale) * np.exp2(octaves) * (1 + places / steps)
    else:
        numbers = np.exp2(codes - 1.0 + power)
    return np.where(codes == 0, 0, numbers)


def decode(codes, scale):
    """What a leaf's codes stand for."""
    signed = np.asarray(codes, np.int64)
    return np.sign(signed) * grid(codes.dtype.name, scale)[abs(signed)]


def assert_scale(dtype, new, old, decay, held, first):
    """The scale after a step: 2^k decay times that before, within 2 of the largest number held.

    There is room for 18 octaves above that number, with a sign for 3. Where nothing is held, or
    nothing of it stays, the scale is the first.
    """
    largest = abs(held).max()
    if decay * largest < TINY:
        np.testing.assert_allclose(new, first, rtol=1e-6)
    else:
        octaves = np.log2(new / (decay * (old or 1.0)))
        np.testing.assert_allclose(octaves, np.round(octaves), atol=1e-6)
        assert 0.5 < new / largest < 2
        room = 18 if dtype == "uint8" else 3
        assert grid(dtype, new)[-1] > 2.0**room * largest * (1 - 1e-6)


def choices(wanted, dtype, scale):
    """The neighbours on the grid; the last number beyond it; below it the first, or with a sign
    that or 0."""
    numbers = grid(dtype, scale)
    size = np.clip(abs(wanted), 0, numbers[-1])
    above = np.clip(np.searchsorted(numbers, size), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    if dtype == "uint8":
        low = np.where((size > 0) & (low == 0), high, low)
    chance = np.where(high > low, (size - low) / np.where(high > low, high - low, 1), 1.0)
    return Choice(np.sign(wanted) * low, np.sign(wanted) * high, chance)

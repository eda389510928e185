"""The tasks of the quality benchmarks, on small synthetic data."""

import functools

import numpy as np

import _tasks
import real_data

RNG = np.random.default_rng(0)


def noise(*shape, largest=256):
    return RNG.integers(largest, size=shape, dtype=np.uint8)


CLOTHES = real_data.FashionMNIST(
    noise(200, 28, 28), noise(200, largest=10), noise(50, 28, 28), noise(50, largest=10)
)
TEXT = "".join(RNG.choice(list("to be, or not that is"), size=3000))

TASKS = {
    "clothes": functools.partial(_tasks.clothes, CLOTHES),
    "lstm": functools.partial(_tasks.lstm, TEXT),
    "transformer": functools.partial(_tasks.transformer, TEXT),
    "words": functools.partial(_tasks.words, TEXT, size=100),
    "regression": _tasks.regression,
}

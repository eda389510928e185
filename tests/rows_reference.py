"""RMSProp on the rows of a table, in float64 NumPy, as TensorFlow's frameworks define it.

It imports nothing from the library. A batch names rows of the table and has a gradient for each. A
row may be named more than once; its gradients then add up. There are two meanings:

- lazy: the rows that the batch names make a step. The others keep their values and their slots.
- dense: all rows make a step, those that are not named with a gradient of 0. Their slots decay,
  and with momentum they move.

TensorFlow 1 and Sonnet are lazy. Keras's legacy optimizer is lazy with momentum, and dense without;
its successor in tf_keras and Keras 3 are dense. Keras 3 does not add up the gradients of a repeated
row before squaring them: its mean square contains the sum of the squares.
"""

from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """The hyperparameters, and what the frameworks do not agree on."""

    decay: float
    epsilon: float
    momentum: float = 0.0
    centered: bool = False
    initial: float = 0.0  # of the mean square
    epsilon_in_root: bool = True
    squares_apart: bool = False  # whether repeated rows add up squares, not the square of the sum


def rule(framework, options):
    """What a framework does with its own arguments."""
    o = DEFAULTS[framework] | options
    return Rule(
        decay=o["decay" if "decay" in o else "rho"],
        epsilon=o["epsilon"],
        momentum=o["momentum"],
        centered=o["centered"],
        initial=1.0 if framework == "tensorflow_v1" else 0.0,
        epsilon_in_root=framework != "keras_legacy" or o["momentum"] > 0,
        squares_apart=framework == "keras",
    )


COMMON = {"momentum": 0.0, "centered": False}
DEFAULTS = {
    "tensorflow_v1": {"decay": 0.9, "epsilon": 1e-10} | COMMON,
    "sonnet": {"decay": 0.9, "epsilon": 1e-10} | COMMON,
    "keras_legacy": {"rho": 0.9, "epsilon": 1e-7} | COMMON,
    "tf_keras": {"rho": 0.9, "epsilon": 1e-7} | COMMON,
    "keras": {"rho": 0.9, "epsilon": 1e-7} | COMMON,
}


def run(start, batches, rates, rule, *, lazy):
    """The table after each step, and the slots {name: array} after the last.

    batches are pairs of rows [k] and their gradients [k, columns]; rates the learning rates.
    """
    table = np.array(start, np.float64)
    square, mean, buffer = (np.full_like(table, value) for value in (rule.initial, 0, 0))
    tables = []
    for (rows, grads), rate in zip(batches, rates, strict=True):
        grads = np.asarray(grads, np.float64)
        g = _scattered(table, rows, grads)
        g2 = _scattered(table, rows, grads**2) if rule.squares_apart else g**2
        at = np.unique(rows) if lazy else slice(None)
        square[at] += (1 - rule.decay) * (g2 - square)[at]
        mean[at] += (1 - rule.decay) * (g - mean)[at]
        spread = square - mean**2 if rule.centered else square
        if rule.epsilon_in_root:
            root = np.sqrt(spread[at] + rule.epsilon)
        else:
            root = np.sqrt(spread[at]) + rule.epsilon
        buffer[at] = rule.momentum * buffer[at] + rate * g[at] / root
        table[at] -= buffer[at]
        tables.append(table.copy())
    return np.stack(tables), {"rms": square, "mg": mean, "momentum": buffer}


def _scattered(table, rows, values):
    total = np.zeros_like(table)
    np.add.at(total, rows, values)
    return total

"""Tells the variables of a Keras optimizer apart, by their paths or by their order in files."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rmsprop_jax.convert._arrays import array
from rmsprop_jax.convert._mapping import Name

IGNORABLE = ("average", "loss_scale")
_AVERAGE, _ACCUMULATOR = "average", "gradient_accumulator"
_SLOTS = (_AVERAGE, _ACCUMULATOR, "velocity", "momentum", "average_gradient")  # in Keras's order
_LOSS_SCALE = 4  # its variables: two unused ones of any optimizer, a counter and the scale
_ASK = {
    _AVERAGE: "to continue without the averages of use_ema, pass ignore=('average',)",
    _ACCUMULATOR: "to continue without them, pass the optimizer's gradient_accumulation_steps",
    "loss_scale": "to continue without the scale of LossScaleOptimizer: ignore=('loss_scale',)",
}


class Arranged(NamedTuple):
    """What from_keras needs of the variables: the number of steps, and the arrays of each slot."""

    steps: int
    slots: dict[str, list[np.ndarray]]


def arranged(
    variables: Sequence[Any] | Mapping[str, Any],
    names: Sequence[Name],
    kept: Sequence[str],
    ignore: Sequence[str],
    accumulation_steps: int | None,
) -> Arranged:
    """Sorts the variables into the slots that tx keeps, for trainable variables of these names.

    Raises:
      ValueError: if they are not exactly these slots, and those to be left out on request.
    """
    if isinstance(ignore, str) or not set(ignore) <= set(IGNORABLE):
        raise ValueError(f"ignore must be of {IGNORABLE}, got {ignore!r}")
    k = accumulation_steps
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 2):
        raise ValueError(f"gradient_accumulation_steps must be an int of at least 2, got {k!r}")
    paths, arrays = _listed(variables)
    count, before = len(names), _LOSS_SCALE if "loss_scale" in ignore else 0
    left = [_AVERAGE] * (_AVERAGE in ignore) + [_ACCUMULATOR] * (k is not None)
    slots = [*left, *kept]
    _refuse_unasked(paths, slots, before)
    begin = len(arrays) - count * len(slots)
    if begin - before not in (1, 2) or not _counted(arrays, begin, before):
        first = "those of the loss scale, " if before else ""
        asked = " and was asked" if left else ""
        raise ValueError(
            f"variables must be {first}the number of steps, the learning rate unless it is a "
            f"schedule, and {count} each of {slots}, as tx has them{asked}; got arrays of shapes "
            f"{[a.shape for a in arrays]}. With momentum or centered there are more, which tx then "
            "needs, too. There are also more with what is not RMSProp: " + "; ".join(_ASK.values())
        )
    for i, path in enumerate(paths[begin:], begin):
        if _kind(path) != (wanted := slots[(i - begin) // count]):
            raise ValueError(f"variables[{i}] is {path!r}, but tx needs {_one(wanted)} there")
    _refuse_another_order(paths[begin : begin + count], names)
    found = {
        slot: arrays[begin + i * count : begin + (i + 1) * count]
        for i, slot in enumerate(slots)
        if slot in kept
    }
    if not paths:
        _refuse_others(found)
    steps = int(arrays[before])
    return Arranged(steps if k is None else steps // k, found)


def _listed(variables: Any) -> tuple[list[str], list[np.ndarray]]:
    """The paths of all variables (an empty list if any lacks one), and the arrays."""
    if not isinstance(variables, Mapping):
        paths = [getattr(variable, "path", "") for variable in variables]
        return paths if all(paths) else [], [array(variable) for variable in variables]
    if all("/" in name for name in variables):
        return list(variables), [array(variable) for variable in variables.values()]
    keys = [str(i) for i in range(len(variables))]
    if set(keys) != set(variables):
        raise ValueError(
            f"variables must be '0', '1', ..., got {sorted(variables)[:20]}; or go by paths, as "
            "'rmsprop/fc_kernel_velocity'"
        )
    return [], [array(variables[key]) for key in keys]


def _counted(arrays: Sequence[np.ndarray], begin: int, before: int) -> bool:
    """Whether there are scalars before the slots, and integers exactly where Keras counts."""
    whole = [i for i, a in enumerate(arrays) if np.issubdtype(a.dtype, np.integer)]
    counters, rate = list(range(0, before + 1, 2)), before + 1  # a rate may be an integer, too
    numbers = all(a.shape == () for a in arrays[:begin])
    return numbers and whole in (counters, [*counters, rate])


def _kind(path: str) -> str:
    """The slot that a variable belongs to, or the last part of its path."""
    last = path.rpartition("/")[2]
    return next((slot for slot in _SLOTS if last.endswith(f"_{slot}")), last)


def _one(slot: str) -> str:
    return f"a{'n' * slot.startswith('a')} {slot}"


def _refuse_unasked(paths: Sequence[str], slots: Sequence[str], before: int) -> None:
    """Refuses, by their paths, variables that do not belong to RMSProp."""
    for i, path in enumerate(paths):
        kind = _kind(path)
        if kind in (_AVERAGE, _ACCUMULATOR) and kind not in slots:
            raise ValueError(
                f"variables[{i}] is {path!r}, but tx needs {_one(slots[0])} there; {_ASK[kind]}"
            )
        if kind == "dynamic_scale" and not before:
            raise ValueError(
                f"variables[{i}] is {path!r}, which tx does not have; {_ASK['loss_scale']}"
            )


def _refuse_another_order(paths: Sequence[str], names: Sequence[Name]) -> None:
    """Refuses names that are those of the paths, but in another order."""
    theirs = [path.rpartition("/")[2].removesuffix(f"_{_kind(path)}") for path in paths]
    ours = [str(name).replace("/", "_") for name in names]
    if theirs != ours and sorted(theirs) == sorted(ours):
        raise ValueError(f"names must be in the order of variables, {theirs}, got {list(names)}")


def _refuse_others(found: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Refuses, by their values, weights or sums of gradients instead of second moments."""
    (velocity, first), *rest = found.items()
    for slot, second in rest[:1]:
        weights = any(np.any(a < 0) for a in first) and not any(np.any(a < 0) for a in second)
        empty = not any(np.any(a) for a in first) and any(np.any(a) for a in second)
        if weights or empty:
            raise ValueError(
                f"variables must have a {velocity} for each trainable variable and then a {slot}, "
                f"but the former {'are below 0' if weights else 'are 0'} where the latter are not, "
                f"as if there were others before: {_ASK[_AVERAGE]}; {_ASK[_ACCUMULATOR]}"
            )

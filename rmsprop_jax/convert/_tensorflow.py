"""The slots of ``tf.compat.v1.train.RMSPropOptimizer``."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from rmsprop_jax.convert._arrays import array
from rmsprop_jax.convert._foreign import Entry, Foreign
from rmsprop_jax.convert._mapping import LeafMapping, Name
from rmsprop_jax.convert._state import to_ours, to_theirs

Slots = Mapping[str, Mapping[Name, Any]]

_SLOTS = {"nu": "rms", "mu": "mg", "trace": "momentum"}  # in TensorFlow's order


def from_tensorflow_v1(
    slots: Slots,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    *,
    steps: int = 0,
) -> optax.OptState:
    """Converts the slots of TensorFlow 1's RMSProp to the state of a transformation.

    s is the slot ``rms``, minus ``mg`` squared if centered. b is ``momentum``, which contains the
    learning rate. TensorFlow keeps this slot even without momentum, in which case it is ignored.
    TensorFlow does not count steps.

    Args:
      slots: ``{"rms": {name: array}, "momentum": {name: array}, "mg": {name: array}}``, the last
        only if centered: the values of ``optimizer.get_slot(variable, slot)`` for each variable, or
        :func:`tensorflow_v1_slots` of a checkpoint.
      params: tree of parameters, of which only the structure, shapes, dtypes and placement matter.
      mapping: for each leaf of params, by its path such as "layer/kernel", the name of TensorFlow's
        variable, or a :class:`Leaf` if the layouts differ.
      tx: the transformation to continue with, usually ``dialects.tensorflow_v1(...)``. It may be
        wrapped: every RMSPropState in its state is filled, the counts of wrappers and schedules
        continue, and everything else is as ``init`` makes it.
      steps: number of steps taken, for the schedules of tx.

    Returns:
      The state of tx.

    Raises:
      ValueError: if slots are missing, left over or of the wrong shape, or if tx cannot express
        their content. Nothing is converted then.
      TypeError: if tx is not a transformation of this library.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import convert, dialects
      >>> params, mapping, tx = {"w": jnp.ones(2)}, {"w": "w"}, dialects.tensorflow_v1(0.1)
      >>> slots = {"rms": {"w": [4.0, 9.0]}, "momentum": {"w": [0.0, 0.0]}}
      >>> state = convert.from_tensorflow_v1(slots, params, mapping, tx, steps=5)
      >>> print(state.count, state.nu["w"])
      5 [4. 9.]
    """
    if unknown := sorted(set(slots) - set(_SLOTS.values())):
        raise ValueError(f"slots must be 'rms', 'momentum' and, if centered, 'mg': got {unknown}")
    if "rms" not in slots or not slots["rms"]:
        raise ValueError("slots must have 'rms'")
    fields = {field: slot for field, slot in _SLOTS.items() if slots.get(slot)}
    for slot in fields.values():
        if differ := sorted(set(slots[slot]) ^ set(slots["rms"]), key=str):
            raise ValueError(f"slots['rms'] and slots[{slot!r}] differ in {differ}")
    entries = {
        name: Entry(**{field: array(slots[slot][name]) for field, slot in fields.items()})
        for name in slots["rms"]
    }
    foreign = Foreign(entries, steps, lr_in_momentum=True, idle_momentum=True)
    return to_ours(foreign, params, mapping, tx)


def to_tensorflow_v1(
    state: optax.OptState,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
) -> dict[str, dict[Name, np.ndarray]]:
    """Converts a state to the slots of TensorFlow 1: the inverse of :func:`from_tensorflow_v1`.

    Args:
      state: the state of tx.
      params: tree of parameters, as in :func:`from_tensorflow_v1`.
      mapping: as in :func:`from_tensorflow_v1`.
      tx: the transformation that the state belongs to.

    Returns:
      ``{"rms": {name: array}, "momentum": {name: array}, "mg": {name: array}}``, the last only if
      centered; the momentum is 0 if tx has none. For ``optimizer.get_slot(variable, slot).assign``.

    Raises:
      ValueError, TypeError: as in :func:`from_tensorflow_v1`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import convert, dialects
      >>> params, mapping, tx = {"w": jnp.ones(2)}, {"w": "w"}, dialects.tensorflow_v1(0.1)
      >>> slots = convert.to_tensorflow_v1(tx.init(params), params, mapping, tx)
      >>> print(slots["rms"]["w"])
      [1. 1.]
    """
    foreign = to_theirs(state, params, mapping, tx, lr_in_momentum=True)
    slots: dict[str, dict[Name, np.ndarray]] = {"rms": {}, "momentum": {}}
    for name, entry in foreign.entries.items():
        if entry is None:
            continue
        slots["rms"][name] = entry.nu
        slots["momentum"][name] = np.zeros_like(entry.nu) if entry.trace is None else entry.trace
        if entry.mu is not None:
            slots.setdefault("mg", {})[name] = entry.mu
    return slots


def tensorflow_v1_slots(
    variables: Mapping[str, Any], optimizer: str = "RMSProp"
) -> dict[str, dict[Name, np.ndarray]]:
    """Finds the slots of RMSProp among the variables in a checkpoint of TensorFlow 1.

    For a variable "w", a ``tf.compat.v1.train.Saver`` names them "w/RMSProp" (rms), "w/RMSProp_1"
    (mg, if centered) and the next number (momentum). For a variable "model/w", a
    ``tf.train.Checkpoint(model=..., optimizer=...)`` names them
    "model/w/.OPTIMIZER_SLOT/optimizer/rms/.ATTRIBUTES/VARIABLE_VALUE" and so on.

    Args:
      variables: those of the checkpoint, by name: ``{name: reader.get_tensor(name) for name in
        reader.get_variable_to_shape_map()}`` with ``reader = tf.train.load_checkpoint(path)``.
      optimizer: its name, or that of the attribute in a ``tf.train.Checkpoint``.

    Returns:
      The slots for :func:`from_tensorflow_v1`. They do not include the number of steps; a Saver has
      it in variables["global_step"], if there was one.

    Raises:
      ValueError: if there are no such slots, or if a variable lacks some of them, or has those of
        several optimizers with one name.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import convert
      >>> variables = {"w": np.ones(2), "w/RMSProp": np.ones(2), "w/RMSProp_1": np.zeros(2)}
      >>> slots = convert.tensorflow_v1_slots(variables)
      >>> {slot: list(names) for slot, names in slots.items()}
      {'rms': ['w'], 'momentum': ['w']}
    """

    def ending(end: str) -> dict[Name, np.ndarray]:
        return {
            name.removesuffix(f"/{end}"): array(value)
            for name, value in variables.items()
            if name.endswith(f"/{end}")
        }

    slots = {
        slot: ending(f".OPTIMIZER_SLOT/{optimizer}/{slot}/.ATTRIBUTES/VARIABLE_VALUE")
        for slot in _SLOTS.values()
    }
    if slots["rms"]:  # legacy Keras without momentum has no slot of it
        slots = {slot: found for slot, found in slots.items() if found}
    else:
        numbers = ("", "_1", "_2", "_3")
        first, second, third, fourth = (ending(optimizer + number) for number in numbers)
        if fourth:
            raise ValueError(
                f"{sorted(fourth, key=str)} have four slots {optimizer!r} or more: "
                "they belong to several optimizers, which cannot be told apart"
            )
        if not first:
            raise ValueError(f"no variable is named like 'w/{optimizer}': {sorted(variables)[:20]}")
        mean = {"mg": second} if third else {}
        slots = {"rms": first, **mean, "momentum": third or second}
    for slot, found in slots.items():
        if differ := sorted(set(found) ^ set(slots["rms"]), key=str):
            raise ValueError(f"{differ} have a slot 'rms' or a slot {slot!r}, but not both")
    return slots

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
    """The state with which a transformation goes on where TensorFlow 1 stopped.

    s is the slot ``rms``, less ``mg`` squared if centered; b is ``momentum``, which has the
    learning rate in it. TensorFlow keeps a momentum even where there is none, and then it is left
    alone. It does not count steps.

    Args:
      slots: ``{"rms": {name: array}, "momentum": {name: array}, "mg": {name: array}}``, the last
        if centered: what ``optimizer.get_slot(variable, slot)`` has for each variable, or
        :func:`tensorflow_v1_slots` of a checkpoint.
      params: tree of parameters; only its structure, shapes, dtypes and placement count.
      mapping: for each leaf of params by its path, as "layer/kernel", the name of TensorFlow's
        variable, or a :class:`Leaf` if the layouts differ.
      tx: the transformation to go on with, ``dialects.tensorflow_v1(...)`` as a rule. It may be
        wrapped: every RMSPropState in its state is filled, the counts of wrappers and schedules
        go on, and all else is as ``init`` makes it.
      steps: how many were taken, for the schedules of tx.

    Returns:
      The state of tx.

    Raises:
      ValueError: if slots are missing, left over or of a wrong shape, or tx cannot express what
        they hold. Nothing is converted then.
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
    """The slots with which TensorFlow 1 goes on: :func:`from_tensorflow_v1` undone.

    Args:
      state: of tx.
      params: tree of parameters, as in :func:`from_tensorflow_v1`.
      mapping: as in :func:`from_tensorflow_v1`.
      tx: the transformation whose state it is.

    Returns:
      ``{"rms": {name: array}, "momentum": {name: array}, "mg": {name: array}}``, the last if
      centered; the momentum is 0 if tx has none. For ``optimizer.get_slot(variable, slot).assign``.

    Raises:
      ValueError, TypeError: as :func:`from_tensorflow_v1`.

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
    """The slots in a checkpoint of TensorFlow 1, where they are variables beside the others.

    A ``tf.compat.v1.train.Saver`` calls those of a variable "w" "w/RMSProp" (rms), "w/RMSProp_1"
    (mg, if centered) and the next number (momentum). A ``tf.train.Checkpoint(model=...,
    optimizer=...)`` calls them "model/w/.OPTIMIZER_SLOT/optimizer/rms/.ATTRIBUTES/VARIABLE_VALUE"
    and so on, of a variable "model/w".

    Args:
      variables: of the checkpoint, by name: ``{name: reader.get_tensor(name) for name in
        reader.get_variable_to_shape_map()}`` with ``reader = tf.train.load_checkpoint(path)``.
      optimizer: its name, or that of the attribute in a ``tf.train.Checkpoint``.

    Returns:
      What :func:`from_tensorflow_v1` takes. The number of steps is not among it; a Saver has it as
      variables["global_step"], if there was one.

    Raises:
      ValueError: if there is no such slot, a variable has not all of them, or has those of several
        optimizers of one name.

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
                "they are of several optimizers, and whose is which is not known"
            )
        if not first:
            raise ValueError(f"no variable is named like 'w/{optimizer}': {sorted(variables)[:20]}")
        mean = {"mg": second} if third else {}
        slots = {"rms": first, **mean, "momentum": third or second}
    for slot, found in slots.items():
        if differ := sorted(set(found) ^ set(slots["rms"]), key=str):
            raise ValueError(f"{differ} have a slot 'rms' or a slot {slot!r}, but not both")
    return slots

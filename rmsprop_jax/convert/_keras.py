"""The variables of Keras 3's ``keras.optimizers.RMSprop``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax

from rmsprop_jax._rule import rules_of
from rmsprop_jax.convert._arrays import array
from rmsprop_jax.convert._foreign import Entry, Foreign
from rmsprop_jax.convert._mapping import LeafMapping, Name, as_leaf
from rmsprop_jax.convert._state import to_ours, to_theirs

_KERAS = {"nu": "velocity", "trace": "momentum", "mu": "average_gradient"}  # in Keras's order


def from_keras(
    variables: Sequence[Any] | Mapping[str, Any],
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    *,
    names: Sequence[str] | None = None,
) -> optax.OptState:
    """The state with which a transformation goes on where ``keras.optimizers.RMSprop`` stopped.

    Keras keeps, in this order: the number of steps; the learning rate, unless it is a schedule;
    a velocity for each trainable variable, which is the second moment s is made of; a momentum
    for each, if there is momentum, which is b with the learning rate in it; and an average
    gradient for each, if centered.

    Args:
      variables: ``optimizer.variables``, or a mapping from "0" on, as ``save_own_variables`` writes
        and as a ``.weights.h5`` file has: ``h5py.File(path)["optimizer/vars"]``. A ``.keras`` file
        is a zip archive with such a file, "model.weights.h5". Neither says which of its arrays is
        what; tx must be of the same form.
      params: tree of parameters; only its structure, shapes, dtypes and placement count.
      mapping: for each leaf of params by its path, as "layer/kernel", the name or number of
        Keras's trainable variable, or a :class:`Leaf` if the layouts differ.
      tx: the transformation to go on with, ``dialects.keras(...)`` as a rule. It may be wrapped:
        every RMSPropState in its state is filled, the counts of wrappers and schedules go on, and
        all else is as ``init`` makes it.
      names: of the trainable variables in their order, ``[v.path for v in
        model.trainable_variables]``; needed if mapping has names.

    Returns:
      The state of tx.

    Raises:
      ValueError: if variables are missing, left over or of a wrong shape, or tx cannot express
        what they hold. Nothing is converted then.
      TypeError: if tx is not a transformation of this library.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import convert, dialects
      >>> params, mapping, tx = {"w": jnp.ones(2)}, {"w": 0}, dialects.keras()
      >>> steps, learning_rate, velocity = 5, 0.001, [4.0, 9.0]
      >>> state = convert.from_keras([steps, learning_rate, velocity], params, mapping, tx)
      >>> print(state.count, state.nu["w"])
      5 [4. 9.]
    """
    arrays = _arrays(variables)
    order = _order(mapping, names)
    fields = _fields(tx, params)
    head = len(arrays) - len(order) * len(fields)
    scalars = head in (1, 2) and all(np.shape(array) == () for array in arrays[:head])
    if not scalars or not np.issubdtype(arrays[0].dtype, np.integer):
        raise ValueError(
            "variables must be the number of steps, the learning rate unless it is a schedule, "
            f"and {len(order)} each of {[_KERAS[field] for field in fields]} as tx has them; "
            f"got arrays of shapes {[np.shape(array) for array in arrays]}"
        )
    for i, variable in enumerate(variables if not isinstance(variables, Mapping) else ()):
        path, wanted = getattr(variable, "path", ""), _KERAS[fields[max(i - head, 0) // len(order)]]
        if i >= head and path and not path.endswith(f"_{wanted}"):
            raise ValueError(f"variables[{i}] is {path!r}, but tx wants a {wanted} there")
    slots = {
        field: arrays[head + i * len(order) : head + (i + 1) * len(order)]
        for i, field in enumerate(fields)
    }
    entries = {
        name: Entry(**{field: slot[i] for field, slot in slots.items()})
        for i, name in enumerate(order)
    }
    steps = int(arrays[0])
    return to_ours(Foreign(entries, steps, lr_in_momentum=True), params, mapping, tx)


def to_keras(
    state: optax.OptState,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    *,
    learning_rate: float | None = None,
    names: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """The variables with which ``keras.optimizers.RMSprop`` goes on: :func:`from_keras` undone.

    Args:
      state: of tx.
      params: tree of parameters, as in :func:`from_keras`.
      mapping: as in :func:`from_keras`.
      tx: the transformation whose state it is.
      learning_rate: of the optimizer that goes on; None if it has a schedule.
      names: as in :func:`from_keras`.

    Returns:
      Arrays for ``optimizer.variables`` in their order, once ``optimizer.build`` has made them:
      ``for v, a in zip(optimizer.variables, arrays): v.assign(a)``.

    Raises:
      ValueError, TypeError: as :func:`from_keras`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import convert, dialects
      >>> params, mapping, tx = {"w": jnp.ones(2)}, {"w": 0}, dialects.keras()
      >>> steps, velocity = convert.to_keras(tx.init(params), params, mapping, tx)
      >>> print(steps, velocity)
      0 [0. 0.]
    """
    foreign = to_theirs(state, params, mapping, tx, lr_in_momentum=True)
    order = _order(mapping, names)
    kept = {name: entry for name, entry in foreign.entries.items() if entry is not None}
    if set(order) != set(kept):
        raise ValueError(f"mapping must name each of {order}, and tx keeps a state of {list(kept)}")
    head = [np.asarray(foreign.steps)]
    if learning_rate is not None:
        head.append(np.asarray(learning_rate))
    return head + [getattr(kept[name], field) for field in _fields(tx, params) for name in order]


def _fields(tx: optax.GradientTransformation, params: optax.Params) -> list[str]:
    """Which slots tx has. Keras has one optimizer for all variables."""
    has = {
        (rule.hyper.momentum is not None, rule.variant.centered) for rule in rules_of(tx, params)
    }
    if len(has) != 1:
        raise ValueError("tx must be one RMSProp for all variables, as Keras has, or alike ones")
    ((momentum, centered),) = has
    return ["nu", *["trace"] * momentum, *["mu"] * centered]


def _order(mapping: LeafMapping, names: Sequence[str] | None) -> list[Name]:
    """The names of the trainable variables in their order, or their numbers."""
    used = {name for leaf in mapping.values() for name in as_leaf(leaf).names()}
    if all(isinstance(name, int) for name in used):
        return list(range(len(used)))
    if names is None:
        raise ValueError("names are needed: mapping has names, not numbers")
    return list(names)


def _arrays(variables: Any) -> list[np.ndarray]:
    if isinstance(variables, Mapping):
        keys = [str(i) for i in range(len(variables))]
        if set(keys) != set(variables):
            raise ValueError(f"variables must be '0', '1', ..., got {sorted(variables)[:20]}")
        variables = [variables[key] for key in keys]
    return [array(variable) for variable in variables]

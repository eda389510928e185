"""The variables of Keras 3's ``keras.optimizers.RMSprop``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax

from rmsprop_jax._rule import rules_of
from rmsprop_jax.convert._foreign import Entry, Foreign
from rmsprop_jax.convert._keras_variables import arranged
from rmsprop_jax.convert._mapping import LeafMapping, Name, as_leaf, names_of
from rmsprop_jax.convert._state import to_ours, to_theirs

_KERAS = {"nu": "velocity", "trace": "momentum", "mu": "average_gradient"}  # in Keras's order


def from_keras(
    variables: Sequence[Any] | Mapping[str, Any],
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    *,
    names: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    gradient_accumulation_steps: int | None = None,
) -> optax.OptState:
    """Converts the variables of ``keras.optimizers.RMSprop`` to the state of a transformation.

    Keras keeps, in this order:

    - the number of steps;
    - the learning rate, unless it is a schedule;
    - a velocity for each trainable variable, from which the second moment s is computed;
    - a momentum for each, if there is momentum, which is b with the learning rate in it;
    - an average gradient for each, if centered.

    Before the velocities, there is an average of each variable with ``use_ema``, and a sum of the
    gradients of each with ``gradient_accumulation_steps``. Before everything, there are four
    numbers of a ``LossScaleOptimizer``. These do not belong to RMSProp, and are left out on
    request.

    Args:
      variables: ``optimizer.variables``; or what :func:`keras_file` has read: a mapping by paths,
        in the optimizer's order, or by "0", "1", ..., as ``save_own_variables`` writes. The latter
        does not say which of its arrays is what, so tx, ignore and gradient_accumulation_steps
        must.
      params: tree of parameters, of which only the structure, shapes, dtypes and placement matter.
      mapping: for each leaf of params, by its path such as "layer/kernel", the name or number of
        Keras's trainable variable, or a :class:`Leaf` if the layouts differ.
      tx: the transformation to continue with, usually ``dialects.keras(...)``. It may be wrapped:
        every RMSPropState in its state is filled, the counts of wrappers and schedules continue,
        and everything else is as ``init`` makes it.
      names: names of the trainable variables in their order, ``[v.path for v in
        model.trainable_variables]``; needed if mapping has names. The variables of a layer with
        ``trainable=False`` are not among them, and tx must freeze them, for example by
        ``optax.partition`` with ``optax.set_to_zero``.
      ignore: "average", "loss_scale" or both, to leave out the averages of ``use_ema`` and the
        numbers of a ``LossScaleOptimizer``; variables must then have them.
      gradient_accumulation_steps: that of the optimizer, if it has any. As Keras then counts small
        batches, the count of tx is the count of Keras divided by it. A sum of gradients that has
        not led to a step yet is left out. Here, ``optax.MultiSteps(tx, k)`` accumulates.

    Returns:
      The state of tx.

    Raises:
      ValueError: if variables are missing, left over or of the wrong shape, or if tx cannot express
        their content. Nothing is converted then.
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
    order, fields = _order(mapping, names), _fields(tx, params)
    kept = [_KERAS[field] for field in fields]
    steps, slots = arranged(variables, order, kept, ignore, gradient_accumulation_steps)
    entries = {
        name: Entry(**{field: slots[_KERAS[field]][i] for field in fields})
        for i, name in enumerate(order)
    }
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
    """Converts a state to the variables of Keras: the inverse of :func:`from_keras`.

    Args:
      state: the state of tx.
      params: tree of parameters, as in :func:`from_keras`.
      mapping: as in :func:`from_keras`.
      tx: the transformation that the state belongs to.
      learning_rate: that of the optimizer that is to continue; None if it has a schedule.
      names: as in :func:`from_keras`.

    Returns:
      Arrays for ``optimizer.variables`` in their order, once ``optimizer.build`` has created them:
      ``for v, a in zip(optimizer.variables, arrays): v.assign(a)``. The optimizer must not have
      anything that ``ignore`` and ``gradient_accumulation_steps`` leave out.

    Raises:
      ValueError, TypeError: as in :func:`from_keras`.

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
        raise ValueError(f"mapping must name each of {order}, but tx has state for {list(kept)}")
    head = [np.asarray(foreign.steps)]
    if learning_rate is not None:
        head.append(np.asarray(learning_rate))
    return head + [getattr(kept[name], field) for field in _fields(tx, params) for name in order]


def _fields(tx: optax.GradientTransformation, params: optax.Params) -> list[str]:
    """The slots that tx has. Keras has one optimizer for all variables."""
    has = {
        (rule.hyper.momentum is not None, rule.variant.centered) for rule in rules_of(tx, params)
    }
    if len(has) != 1:
        raise ValueError("tx must be one RMSProp for all variables, as in Keras, or several alike")
    ((momentum, centered),) = has
    return ["nu", *["trace"] * momentum, *["mu"] * centered]


def _order(mapping: LeafMapping, names: Sequence[str] | None) -> list[Name]:
    """The names of the trainable variables in their order, or their numbers."""
    used = names_of(map(as_leaf, mapping.values()))
    if all(isinstance(name, int) for name in used):
        return list(range(len(used)))
    if names is None:
        raise ValueError("names are needed: mapping has names, not numbers")
    return list(names)

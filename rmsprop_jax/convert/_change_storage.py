"""A state from one storage to another."""

from typing import Any

import jax
import jax.numpy as jnp

from rmsprop_jax._rule import RMSPropState, rules_of
from rmsprop_jax._storage import Slot, is_packed
from rmsprop_jax.convert._state import is_ours, place


def change_storage(state: Any, params: Any, tx: Any) -> Any:
    """The state with which a transformation goes on where one of another ``storage`` stopped.

    From fewer bits to more, and between float32 and float64, values are what they were. To
    ``low_memory.bfloat16`` each is rounded to the nearest, by 2^-9 at most; to ``low_memory.q8``
    second moments are rounded by 1/16 at most, and raised to 2^-31 of the largest in their block
    where they are below; values of momentum by 1/16 or 2^-19 of the largest in their block. From q8
    to q8 with other blocks they are rounded so again.

    Args:
      state: of a transformation like tx but for ``storage``: say a float32 run that goes on in 8
        bits, or the other way round. It may be of a wrapper, as tx then is.
      params: tree of parameters; only its structure, shapes, dtypes and placement count.
      tx: the transformation to go on with.

    Returns:
      The state of tx; what is not of an RMSPropState is that of ``state``.

    Raises:
      ValueError: if the states differ in more than how slots are held.
      TypeError: if tx is not a transformation of this library.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import convert, low_memory, rmsprop
      >>> params = jnp.ones(4096)
      >>> plain, small = rmsprop(0.1), rmsprop(0.1, storage=low_memory.q8())
      >>> _, state = plain.update(2 * params, plain.init(params))
      >>> held = convert.change_storage(state, params, small)
      >>> print(held.nu.codes.dtype, convert.change_storage(held, params, plain).nu[0])
      uint8 0.40625
    """
    rules_of(tx)
    old: Any = jax.tree.flatten(state, is_leaf=is_ours)
    new: Any = jax.tree.flatten(tx.init(params), is_leaf=is_ours)
    if old[1] != new[1]:
        raise ValueError(f"state must be like that of tx, {new[1]}, got {old[1]}")
    parts = [_changed(a, b) if is_ours(b) else a for a, b in zip(old[0], new[0], strict=True)]
    return jax.tree.unflatten(new[1], parts)


def _changed(state: RMSPropState, template: RMSPropState) -> RMSPropState:
    old: Any = jax.tree.flatten(state, is_leaf=is_packed)
    new: Any = jax.tree.flatten(template, is_leaf=is_packed)
    shapes = [[jnp.shape(slot) for slot in slots] for slots, _ in (old, new)]
    if old[1] != new[1] or shapes[0] != shapes[1]:
        raise ValueError(
            f"state must have the slots of tx: it has {_slots(state)}, of shapes {shapes[0]}; "
            f"tx {_slots(template)}, of {shapes[1]}"
        )
    return jax.tree.unflatten(new[1], map(_moved, old[0], new[0]))


def _moved(old: Slot, new: Slot) -> Slot:
    alike = type(old) is type(new) and jax.tree.map(_form, old) == jax.tree.map(_form, new)
    if alike:
        return jax.tree.map(place, new, old)
    return place(new, old.decode() if is_packed(old) else old)


def _form(array: jax.Array) -> tuple[Any, ...]:
    return array.shape, array.dtype


def _slots(state: RMSPropState) -> list[str]:
    return [name for name, slot in state._asdict().items() if slot is not None]

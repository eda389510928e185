"""Conversion of a state from one storage to another."""

from typing import Any

import jax
import optax

from rmsprop_jax._rule import RMSPropState, is_ours, some_rules
from rmsprop_jax._storage import is_packed, slots_of, with_slots
from rmsprop_jax.convert._arrays import place


def change_storage(
    state: optax.OptState, params: optax.Params, tx: optax.GradientTransformation
) -> optax.OptState:
    """Converts a state to another ``storage``, for example from float32 to 8 bits.

    From fewer bits to more, and between float32 and float64, the values do not change. To
    ``low_memory.bfloat16`` each value is rounded to nearest, by at most 2^-8. To ``low_memory.q8``
    second moments are rounded by at most 1/8, and raised to about 2^-45 of the largest in their
    leaf if they are below that; values of momentum are rounded by 1/16, or 2^-13 of the largest in
    their leaf.

    Args:
      state: the state of a transformation like tx except for ``storage``: for example that of a
        float32 run which is to continue in 8 bits, or vice versa. It may be that of a wrapper, if
        tx is wrapped in the same way.
      params: tree of parameters, of which only the structure, shapes, dtypes and placement matter.
      tx: the transformation to continue with.

    Returns:
      The state of tx; parts that do not belong to an RMSPropState are taken from ``state``.

    Raises:
      ValueError: if the states differ in more than how slots are stored.
      TypeError: if tx is not a transformation of this library.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import convert, low_memory, rmsprop
      >>> params = jnp.ones(4096)
      >>> plain, small = rmsprop(0.1), rmsprop(0.1, storage=low_memory.q8())
      >>> _, state = plain.update(2 * params, plain.init(params))
      >>> held = convert.change_storage(state, params, small)
      >>> print(held.nu.codes.dtype, convert.change_storage(held, params, plain).nu[0])
      uint8 0.375
    """
    init = getattr(tx, "init", lambda params: params)
    old: Any = jax.tree.flatten(state, is_leaf=is_ours)
    new: Any = jax.tree.flatten(init(params), is_leaf=is_ours)
    if not any(map(is_ours, new[0])):
        some_rules(tx, [])
    if old[1] != new[1]:
        raise ValueError(f"state must be like that of tx, {new[1]}, got {old[1]}")
    parts = [_changed(a, b) if is_ours(b) else a for a, b in zip(old[0], new[0], strict=True)]
    return jax.tree.unflatten(new[1], parts)


def _changed(state: RMSPropState, template: RMSPropState) -> RMSPropState:
    fields = [name for name, held in template._asdict().items() if held is not None]
    has = [name for name, held in state._asdict().items() if held is not None]
    if has != fields:
        raise ValueError(f"state must have the fields of tx, {fields}, got {has}")
    return template._replace(
        **{name: _moved(getattr(state, name), getattr(template, name)) for name in fields}
    )


def _moved(old: Any, new: Any) -> Any:
    """The content of one field, in the form of another."""
    structures: list[Any] = [jax.tree.structure(field) for field in (old, new)]
    if structures[0] == structures[1] and jax.tree.map(_type, old) == jax.tree.map(_type, new):
        return jax.tree.map(place, new, old)
    sources: Any = jax.tree.flatten(slots_of(old), is_leaf=is_packed)
    targets: Any = jax.tree.flatten(slots_of(new), is_leaf=is_packed)
    shapes = [[slot.shape for slot in slots] for slots, _ in (sources, targets)]
    if sources[1] != targets[1] or shapes[0] != shapes[1]:
        raise ValueError(
            f"state must be of the parameters: it has slots of shapes {shapes[0]} in "
            f"{sources[1]}, tx of {shapes[1]} in {targets[1]}"
        )
    values = [slot.decode() if is_packed(slot) else slot for slot in sources[0]]
    slots = map(place, targets[0], values)
    return with_slots(new, jax.tree.unflatten(targets[1], slots))


def _type(array: jax.Array) -> tuple[Any, ...]:
    return array.shape, array.dtype

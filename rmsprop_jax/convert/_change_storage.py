"""A state from one storage to another."""

from typing import Any

import jax
import optax

from rmsprop_jax._rule import RMSPropState, is_ours, some_rules
from rmsprop_jax._storage import is_packed, slots_of, with_slots
from rmsprop_jax.convert._arrays import place


def change_storage(
    state: optax.OptState, params: optax.Params, tx: optax.GradientTransformation
) -> optax.OptState:
    """The state with which a transformation goes on where one of another ``storage`` stopped.

    From fewer bits to more, and between float32 and float64, values are what they were. To
    ``low_memory.bfloat16`` each is rounded to the nearest, by 2^-8 at most; to ``low_memory.q8``
    second moments are rounded by 1/8 at most, and raised to some 2^-45 of the largest in their
    leaf where they are below; values of momentum are rounded by 1/16, or 2^-13 of the largest in
    their leaf.

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
    """What one field holds, in the form of another."""
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

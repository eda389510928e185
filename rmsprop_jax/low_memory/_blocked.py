"""A field of the state whose slots are in 8 bits."""

from collections.abc import Collection
import contextlib
import math
from typing import Any, NamedTuple

import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from rmsprop_jax._storage import Joined, Slot, is_packed
from rmsprop_jax._types import PyTree
from rmsprop_jax.low_memory._blocks import block_of, divides_shards
from rmsprop_jax.low_memory._eight_bit import EightBit, per_block

_LARGE = 4096  # numbers of which a byte each would count


@Joined.register
class Blocked(NamedTuple):
    """Slots in 8 bits, taken apart.

    Attributes:
      codes: a tree like the parameters, of codes in uint8 or int8; of the numbers themselves for
        a leaf that is not held in 8 bits.
      exponents: a tree like the parameters, of uint8, one a block; of zeros for such a leaf.
      scales: float32 in [1, 2), one for each leaf.
    """

    codes: PyTree
    exponents: PyTree
    scales: jax.Array

    @property
    def shared(self) -> Collection[str]:
        return ("scales",)

    def slots(self) -> PyTree:
        structure: Any
        leaves, structure = jax.tree.flatten(self.codes)
        exponents = structure.flatten_up_to(self.exponents)
        slots = []
        for leaf, (code, exponent) in enumerate(zip(leaves, exponents, strict=True)):
            plain = jnp.issubdtype(code.dtype, jnp.inexact) and exponent.dtype == jnp.uint8
            slot = EightBit(code, exponent, self.scales, np.int32(leaf))
            slots.append(code if plain else slot)
        return structure.unflatten(slots)

    def with_slots(self, slots: PyTree) -> "Blocked":
        """The field with other slots: of each the scales are those of the field, or new.

        They are the field's where a leaf was left out of a step, and all new ones are the same.
        """
        exponents = jax.tree.map(
            lambda slot, old: slot.exponents if is_packed(slot) else old,
            slots,
            self.exponents,
            is_leaf=is_packed,
        )
        found = jax.tree.leaves(slots, is_leaf=is_packed)
        left_out = [is_packed(slot) and slot.scales is self.scales for slot in found]
        new = [slot.scales for slot in found if is_packed(slot) and slot.scales is not self.scales]
        scales = new[0] if new else self.scales
        if any(left_out):
            scales = jnp.where(np.asarray(left_out), self.scales, scales)
        return Blocked(_codes(slots), exponents, scales)


with contextlib.suppress(ValueError):  # registered already, if this module is reloaded
    export.register_namedtuple_serialization(Blocked, serialized_name="rmsprop_jax.Blocked")


def blocked(slots: PyTree, block: int) -> Blocked:
    """The field of slots that were just made, which all have the same scale."""
    found = jax.tree.leaves(slots, is_leaf=is_packed)
    scale = next((slot.scales[0] for slot in found if is_packed(slot)), 1.0)
    codes = _codes(slots)
    scales = jnp.full(max(len(found), 1), scale, jnp.float32)  # never of size 0
    for array in jax.tree.leaves(codes)[:1]:
        scales = _beside(scales, array)
    exponents = jax.tree.map(lambda slot: _exponents(slot, block), slots, is_leaf=is_packed)
    return Blocked(codes, exponents, scales)


def _beside(scales: jax.Array, array: jax.Array) -> jax.Array:
    """The scales on every device of an array, as their own update leaves them."""
    if isinstance(array, jax.core.Tracer):
        mesh = jax.typeof(array).sharding.mesh
        if mesh.axis_types and all(kind == AxisType.Explicit for kind in mesh.axis_types):
            scales = jax.reshard(scales, NamedSharding(mesh, PartitionSpec(None)))
        return scales
    if not getattr(array, "committed", False):
        return scales
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        sharding = sharding.update(spec=PartitionSpec())
    return jax.device_put(scales, sharding)


def _codes(slots: PyTree) -> PyTree:
    return jax.tree.map(
        lambda slot: slot.codes if is_packed(slot) else slot, slots, is_leaf=is_packed
    )


def _exponents(slot: Slot, block: int) -> jax.Array:
    """The exponents of a slot; zeros of a shape that can be sharded like it if it has none."""
    if is_packed(slot):
        return slot.exponents
    if math.prod(slot.shape) < _LARGE:
        return per_block(slot, 1, 0)
    block = block_of(slot.shape[-1], block)
    return per_block(slot, block if divides_shards(slot, block) else 1, 0)

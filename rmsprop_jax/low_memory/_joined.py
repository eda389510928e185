"""A field of the state whose slots are in 8 bits."""

from collections.abc import Collection, Sequence
import contextlib
from typing import Any, NamedTuple

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._storage import Joined, beside, is_packed
from rmsprop_jax._types import PyTree
from rmsprop_jax.low_memory._eight_bit import EightBit, powers_of


@Joined.register
class EightBits(NamedTuple):
    """The 8-bit slots of all leaves, as separate trees of codes and scales.

    Attributes:
      codes: a tree like the parameters, of codes in uint8 or int8, or of the numbers themselves for
        a leaf that is not stored in 8 bits.
      scales: float32, one for each leaf.
    """

    codes: PyTree
    scales: jax.Array

    @property
    def shared(self) -> Collection[str]:
        return ("scales",)

    def check(self, field: str) -> None:
        leaves = jax.tree.leaves(self.codes)
        wanted = jnp.dtype(jnp.uint8 if field == "nu" else jnp.int8)
        for dtype in {leaf.dtype for leaf in leaves if _is_code(leaf)} - {wanted}:
            raise TypeError(f"state.{field}.codes must be {wanted} or floating, got {dtype}")
        found, shape = self.scales.dtype, jnp.shape(self.scales)
        if found != jnp.float32 or shape != (max(len(leaves), 1),):
            raise TypeError(
                f"state.{field}.scales must be float32, one for each of {len(leaves)} leaves, got "
                f"{found}{[*shape]}"
            )

    def slots_to_step(self) -> PyTree:
        leaves = jax.tree.leaves(self.codes)
        return self.slots(powers_of(leaves, self.scales) if any(map(_is_code, leaves)) else None)

    def slots(self, powers: jax.Array | None = None) -> PyTree:
        structure: Any
        leaves, structure = jax.tree.flatten(self.codes)
        return structure.unflatten(
            EightBit(code, self.scales, np.int32(leaf), powers) if _is_code(code) else code
            for leaf, code in enumerate(leaves)
        )

    def with_slots(self, slots: PyTree) -> "EightBits":
        found = jax.tree.leaves(slots, is_leaf=is_packed)
        vectors = [slot.scales for slot in found if is_packed(slot)]
        own = [slot.scales if is_packed(slot) else vectors[0] for slot in found if vectors]
        return EightBits(_codes(slots), _diagonal(own) if own else self.scales)


with contextlib.suppress(ValueError):  # registered already, if this module is reloaded
    export.register_namedtuple_serialization(EightBits, serialized_name="rmsprop_jax.EightBits")


def joined(slots: PyTree) -> EightBits:
    """The field of newly created slots, which all have the same scale."""
    codes = _codes(slots)
    found = jax.tree.leaves(slots, is_leaf=is_packed)
    scale = next((slot.scales[0] for slot in found if is_packed(slot)), 0.0)
    scales = jnp.full(max(len(found), 1), scale, jnp.float32)  # never of size 0
    return EightBits(codes, beside(scales, codes))


def _codes(slots: PyTree) -> PyTree:
    return jax.tree.map(
        lambda slot: slot.codes if is_packed(slot) else slot, slots, is_leaf=is_packed
    )


def _is_code(array: Any) -> bool:
    return not jnp.issubdtype(array.dtype, jnp.inexact)


@jax.jit
def _diagonal(vectors: Sequence[jax.Array]) -> jax.Array:
    """The i-th element of the i-th vector, for as many vectors as they have elements."""
    return jnp.stack([jnp.asarray(vector)[i] for i, vector in enumerate(vectors)])

"""How one slot of one leaf is held, and how it advances.

The equations ask three things of a storage and do not know what its slots are made of.
"""

from typing import Any, Protocol, runtime_checkable

import jax
from jax import lax
import jax.numpy as jnp

from rmsprop_jax._arrays import clip

Slot = Any  # an array; a storage of few bits may need more than one


@runtime_checkable
class Storage(Protocol):
    """Hashable, as a static argument must be; not callable, since callables are schedules."""

    def init(self, param: jax.Array, value: Any, *, signed: bool, real: bool = False) -> Slot:
        """A slot full of value, placed like param; complex if param is, unless it must be real.

        Both parts of a complex slot are value. What is not signed never falls below 0.
        """

    def dtype(self, slot: Slot) -> jnp.dtype:
        """The dtype of the arithmetic on a slot's real numbers: float32 or float64."""

    def accumulate(
        self, slot: Slot, decay: jax.Array, term: jax.Array, bound: float | None = None
    ) -> tuple[jax.Array, Slot]:
        """The sum decay * slot + term, that product within a bound, as an array and as a slot."""


class Float32:
    """One array a slot: float32, or float64 for a float64 parameter."""

    def init(
        self,
        param: jax.Array,
        value: Any,
        *,
        signed: bool,  # noqa: ARG002
        real: bool = False,
    ) -> jax.Array:
        wide = jnp.finfo(jnp.result_type(param)).bits > 32
        dtype = jnp.float64 if wide else jnp.float32
        if jnp.iscomplexobj(param) and not real:
            dtype = jnp.complex128 if wide else jnp.complex64
            value = value * (1 + 1j)
        if not isinstance(param, jax.core.Tracer):
            return jnp.full_like(param, value, dtype=dtype)
        # A traced constant depends on no parameter and could be placed anywhere. These zeros
        # depend on param, but not on its values: nothing, not even NaN, is below itself.
        zeros = lax.convert_element_type(lax.lt(param.real, param.real), dtype)
        return zeros + jnp.asarray(value, dtype)

    def dtype(self, slot: jax.Array) -> jnp.dtype:
        return jnp.finfo(slot.dtype).dtype

    def accumulate(
        self, slot: jax.Array, decay: jax.Array, term: jax.Array, bound: float | None = None
    ) -> tuple[jax.Array, jax.Array]:
        past = decay * slot
        if bound is not None:
            past = clip(past, bound)
        slot = past + term
        return slot, slot


FLOAT32 = Float32()

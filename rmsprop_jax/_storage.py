"""How one slot of one leaf is stored, and how it advances.

The equations use three methods of a storage and do not know what its slots are made of.
"""

import abc
from collections.abc import Callable, Collection
import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from rmsprop_jax._arrays import clip
from rmsprop_jax._types import PyTree, Scalar

Slot = Any  # an array, or something Packed
# Arrays computed where they are needed: XLA:CPU would store those computed earlier.
Lazy = Callable[[], jax.Array]
Copies = Callable[[int], jax.Array]  # all copies are equal


class Packed(abc.ABC):
    """A slot that is more than one array: a NamedTuple, registered as a subclass of this."""

    shape: tuple[int, ...]  # of the parameter
    dtype: jnp.dtype  # of the values

    @abc.abstractmethod
    def decode(self) -> jax.Array:
        """The values."""

    @abc.abstractmethod
    def encode(self, values: ArrayLike) -> Any:
        """A slot of the same form that holds values as exactly as it can."""


class Joined(abc.ABC):
    """A field of the state with Packed slots: a NamedTuple, registered as a subclass of this.

    It holds trees like the parameters, whose arrays can be sharded like them, and scalars or
    vectors. Wrappers can handle these: they traverse trees of arrays, but not slots.
    """

    @property
    @abc.abstractmethod
    def shared(self) -> Collection[str]:
        """The names of those entries that are not such trees."""

    @abc.abstractmethod
    def check(self, field: str) -> None:
        """Refuses arrays that a field of this name cannot have."""

    @abc.abstractmethod
    def slots(self) -> PyTree:
        """The slots, in a tree like the parameters."""

    @abc.abstractmethod
    def slots_to_step(self) -> PyTree:
        """The same, with what a step needs to know about all slots together."""

    @abc.abstractmethod
    def with_slots(self, slots: PyTree) -> PyTree:
        """The field with other slots, some of which may be its own."""


def is_packed(value: Any) -> bool:
    """Whether a node or leaf of a tree of slots is a slot of several arrays."""
    return isinstance(value, Packed)


def slots_of(field: PyTree) -> PyTree:
    """The slots of a field of the state, in a tree like the parameters."""
    return field.slots() if isinstance(field, Joined) else field


def slots_to_step(field: PyTree) -> PyTree:
    """The slots of a field of the state that is to be updated."""
    return field.slots_to_step() if isinstance(field, Joined) else field


def with_slots(field: PyTree, slots: PyTree) -> PyTree:
    """A field of the state with these slots instead of its own."""
    return field.with_slots(slots) if isinstance(field, Joined) else slots


class Draw(NamedTuple):
    """What stochastic rounding depends on: equal slots and steps draw the same random bits.

    Attributes:
      step: number of earlier steps, int32.
      leaf: a number for the leaf's path, uint32.
      slot: a number for the slot.
      zero: 0 where a term may enter the state, and NaN elsewhere.
      size: the approximate size of the largest terms, if known; a scalar.
    """

    step: jax.Array
    leaf: jax.Array
    slot: int
    zero: Lazy
    size: jax.Array | None = None


@runtime_checkable
class Storage(Protocol):
    """Hashable, as a static argument must be; not callable, since callables are schedules."""

    @property
    def draws(self) -> bool:
        """Whether accumulate needs a draw."""

    @property
    def joins(self) -> Collection[str]:
        """The fields of the state that join turns into something Joined."""

    @property
    def dtypes(self) -> Collection[jnp.dtype]:
        """The real dtypes that a slot may have."""

    def init(
        self, param: jax.Array, value: Scalar, *, field: str, path: str, real: bool = False
    ) -> Slot:
        """A slot full of value, placed like param; complex if param is, unless real is True.

        Both parts of a complex slot equal value. field is the field of the state: nu never falls
        below 0, and mu must be precise if nu beside it is a variance. path is that of the leaf.
        """

    def join(self, slots: PyTree, *, field: str) -> PyTree:
        """A field of the state, from the slots that init made, in a tree like the parameters."""

    def dtype(self, slot: Slot) -> jnp.dtype:
        """The dtype of the arithmetic on a slot's real numbers: float32 or float64."""

    def accumulate(
        self,
        slot: Slot,
        decay: jax.Array,
        term: Lazy,
        bound: float | None = None,
        *,
        low: jax.Array | None = None,
        draw: Draw | None = None,
    ) -> tuple[Copies, Slot]:
        """The sum decay * slot + term, with that product within bound, as an array and as a slot.

        low holds the digits of decay that its dtype lacks, for slots precise enough for them.
        """


@dataclasses.dataclass(frozen=True)
class Float32:
    """One array per slot: float32, or float64 for a float64 parameter."""

    draws: ClassVar = False
    joins: ClassVar = ()
    dtypes: ClassVar = frozenset({jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)})

    def init(
        self,
        param: jax.Array,
        value: Scalar,
        *,
        field: str = "",  # noqa: ARG002
        path: str = "",  # noqa: ARG002
        real: bool = False,
    ) -> jax.Array:
        wide = jnp.finfo(jnp.result_type(param)).bits > 32
        dtype = jnp.float64 if wide else jnp.float32
        if jnp.iscomplexobj(param) and not real:
            dtype = jnp.complex128 if wide else jnp.complex64
            return full_like(param, value * (1 + 1j), dtype)
        return full_like(param, value, dtype)

    def join(self, slots: PyTree, *, field: str) -> PyTree:
        del field
        return slots

    def dtype(self, slot: jax.Array) -> jnp.dtype:
        return jnp.finfo(slot.dtype).dtype

    def accumulate(
        self,
        slot: jax.Array,
        decay: jax.Array,
        term: Lazy,
        bound: float | None = None,
        *,
        low: jax.Array | None = None,
        draw: Draw | None = None,  # noqa: ARG002
    ) -> tuple[Copies, jax.Array]:
        past = decay * slot
        if bound is not None:
            past = clip(past, bound)
        slot = past + (term() if low is None else term() + low * slot)
        return lambda _: slot, slot


FLOAT32 = Float32()


def full_like(param: jax.Array, value: complex | jax.Array, dtype: Any) -> jax.Array:
    """An array full of value, with the shape and placement of param, eagerly or traced."""
    if not isinstance(param, jax.core.Tracer):
        return jnp.full_like(param, value, dtype=dtype)
    # With no mesh in its type and only one device, there is only one place: a constant will do.
    if jax.typeof(param).sharding.mesh.empty and jax.device_count() == 1:
        return lax.full(param.shape, value, dtype)
    # Elsewhere a traced constant could be placed anywhere, since it depends on no parameter. These
    # zeros depend on param but not on its values: nothing, not even NaN, is less than itself.
    real = lax.real(param) if jnp.iscomplexobj(param) else param
    zeros = lax.convert_element_type(lax.lt(real, real), dtype)
    is_zero = not isinstance(value, jax.Array) and value == 0
    return zeros if is_zero else zeros + jnp.asarray(value, dtype)


def beside(array: jax.Array, params: PyTree) -> jax.Array:
    """A small array, replicated over the devices of the params, as a step leaves it.

    Otherwise a step would be compiled twice: for its placement now, and for the one after a step.
    """
    leaves = jax.tree.leaves(params)
    full = PartitionSpec(*[None] * array.ndim)  # as under jit on Explicit meshes; () on others
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        mesh = jax.typeof(leaves[0]).sharding.mesh
        return jax.reshard(array, NamedSharding(mesh, full)) if _is_explicit(mesh) else array
    places = [leaf.sharding for leaf in leaves if getattr(leaf, "committed", False)]
    if len({frozenset(place.device_set) for place in places}) != 1:
        return array  # there is no common placement
    place = places[0]
    if isinstance(place, NamedSharding):
        place = place.update(spec=full if _is_explicit(place.mesh) else PartitionSpec())
    return jax.device_put(array, place)


def _is_explicit(mesh: Any) -> bool:
    return {*mesh.axis_types} == {AxisType.Explicit}

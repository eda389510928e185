"""Which slot of which leaf is held how, and its advance."""

import abc
from collections.abc import Callable, Collection
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from rmsprop_jax import _checks
from rmsprop_jax._arrays import by_parts, unfused
from rmsprop_jax._storage import FLOAT32, Copies, Draw, Lazy, Slot, Storage, full_like, is_packed
from rmsprop_jax._types import PyTree, Scalar
from rmsprop_jax.low_memory._bfloat16 import accumulate_bfloat16
from rmsprop_jax.low_memory._eight_bit import accumulate_eight_bit, eight_bit_like
from rmsprop_jax.low_memory._joined import joined
from rmsprop_jax.low_memory._random import AxisName, random_key

_TRACE = 2  # the number of momentum's slot


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class LowMemory(abc.ABC):
    """A storage that holds the slots of most leaves in fewer than 32 bits a number."""

    seed: int
    exempt: Callable[[str], bool] | None
    axis_name: AxisName | None

    @property
    def draws(self) -> bool:
        return True

    @property
    def joins(self) -> Collection[str]:
        return ()

    @property
    def dtypes(self) -> Collection[jnp.dtype]:
        return FLOAT32.dtypes | {jnp.dtype(jnp.bfloat16)}

    def init(
        self, param: jax.Array, value: Scalar, *, field: str, path: str, real: bool = False
    ) -> Slot:
        exempt = self.exempt is not None and self.exempt(path)
        shape = getattr(param, "shape", ())
        if exempt or jnp.iscomplexobj(param) or not shape or 0 in shape:
            return FLOAT32.init(param, value, real=real)
        return self._small(param, value, field)

    @abc.abstractmethod
    def _small(self, param: jax.Array, value: Scalar, field: str) -> Slot:
        """A slot of a leaf that may be held in fewer bits."""

    def join(self, slots: PyTree, *, field: str) -> PyTree:
        del field
        return slots

    def dtype(self, slot: Slot) -> jnp.dtype:
        real = jnp.finfo(slot.dtype).dtype
        return jnp.dtype(jnp.float32) if real == jnp.bfloat16 else real

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
        assert draw is not None

        def kept() -> jax.Array:
            new = term()
            return unfused(jnp.where(jnp.isfinite(new + draw.zero()), new, 0), draw.step >> 31)

        def lost(copy: int) -> jax.Array:
            if draw.slot == _TRACE:  # NaN as its term would be, which needs a root
                return by_parts(lambda part: lax.max(part, part.dtype.type(-copy)), draw.zero())
            return jnp.where(jnp.isfinite(draw.zero()), 0, term())

        accumulate = self._accumulator(slot)
        if accumulate is None:
            values, slot = FLOAT32.accumulate(slot, decay, kept, bound, low=low)
        else:
            key = random_key(self.seed, self.axis_name, draw)
            values, slot = accumulate(slot, decay, kept, bound, draw, key)
        return lambda copy: values(copy) + lost(copy), slot

    def _accumulator(self, slot: Slot) -> Callable[..., tuple[Copies, Slot]] | None:
        """What advances a slot that is held in fewer bits; None for one that is not."""
        return accumulate_bfloat16 if slot.dtype == jnp.bfloat16 else None

    def __repr__(self) -> str:
        names = [field.name for field in dataclasses.fields(self)]
        names.sort(key=lambda name: name in LowMemory.__dataclass_fields__)
        fields = {name: getattr(self, name) for name in names}
        given = ", ".join(f"{n}={v!r}" for n, v in fields.items() if v is not None)
        return f"{type(self).__name__.lower()}({given})"


class Bfloat16(LowMemory):
    """Every slot in bfloat16."""

    def _small(self, param: jax.Array, value: Scalar, field: str) -> jax.Array:
        del field
        return full_like(param, value, jnp.bfloat16)


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class Q8(LowMemory):
    """The slots of leaves of min_size in 8 bits, but for means."""

    min_size: int

    def _small(self, param: jax.Array, value: Scalar, field: str) -> Slot:
        if math.prod(param.shape) < self.min_size:
            return FLOAT32.init(param, value)
        if field == "mu":  # a variance beside it would be of the error of 8 bits
            return full_like(param, value, jnp.bfloat16)
        return eight_bit_like(param, value, signed=field != "nu")

    def _accumulator(self, slot: Slot) -> Callable[..., tuple[Copies, Slot]] | None:
        return accumulate_eight_bit if is_packed(slot) else super()._accumulator(slot)

    @property
    def joins(self) -> Collection[str]:
        return "nu", "trace"

    def join(self, slots: PyTree, *, field: str) -> PyTree:
        return joined(slots) if field in self.joins else slots


def q8(
    min_size: int = 4096,
    seed: int = 0,
    *,
    exempt: Callable[[str], bool] | None = None,
    axis_name: AxisName | None = None,
) -> Storage:
    """State in 8 bits a number: a quarter of the memory of float32.

    Each second moment has 6 bits for the octave and 2 for the place in it, each value of momentum
    a sign, 4 bits and 3, under one scale for the whole leaf. The mean of the centered form is held
    as by :func:`bfloat16`, since a variance would be of the size of an error of 8 bits in it.

    What is guaranteed, for a given sequence of gradients, against the state in float32:

    - The mean of a second moment over seeds is that in float32; so is that of momentum, as far as
      it depends on the steps alone.
    - The standard deviation of a second moment is at most .35 of it: .16 at decay .9, .28 at .99,
      .31 at .999. An update has half that noise, 7%, 14% and 16%, and is in the mean 1%, 3% and 4%
      longer.
    - Where no gradient arrives, second moments and momentum decay exactly.
    - What is not 0 never becomes 0: a second moment more than 45 octaves, a factor of 3e13, below
      the largest in its leaf becomes what is 45 octaves below, so that the update is too short,
      never too long.
    - In one step a second moment may grow to 18 octaves, a factor of 2.6e5, above the largest of
      the leaf before. What grows more is held as that, and the next steps make up 18 octaves each:
      until then updates are longer than in float32, but not longer than learning_rate /
      sqrt(1 - decay), which bounds every update. So one gradient of 1e8 among gradients of size 1
      does not slow its neighbours, and its own coordinate less than in float32.
    - Parameters move by momentum as it is held. It may grow to 3 octaves, a factor of 8, above the
      largest of the leaf before: after a learning rate that jumps up by more, updates are too short
      for a few steps. Where steps are far below learning_rate / sqrt(1 - decay) from the start, as
      under a large eps, the first ones are noisy.
    - The noise of momentum adds up: it is 11% of its root mean square at .9, 29% at .99, and as
      large as momentum itself at .999. Use :func:`bfloat16` for momentum above .99.

    It is not guaranteed that the updates or losses of a run are those in float32: each update
    differs at random.

    Args:
      min_size: leaves of fewer elements stay in float32.
      seed: of the rounding; any integer.
      exempt: function of a leaf's path, as "layer/kernel", that is true where it stays in float32.
      axis_name: of the axes of ``pmap`` or ``shard_map`` over which every leaf is sharded.

    Returns:
      A storage. ``nu`` and ``trace`` of the state are NamedTuples of ``codes``, a tree like the
      parameters, in uint8 or int8, or float32 where a leaf is; and ``scales``, a vector with one
      for each leaf. Any shape and any sharding will do.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type, or out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import low_memory, rmsprop
      >>> params = {"kernel": jnp.ones((512, 1024)), "bias": jnp.ones(1024)}
      >>> tx = rmsprop(1e-3, momentum=0.9, storage=low_memory.q8())
      >>> state = tx.init(params)
      >>> held = sum(array.nbytes for array in jax.tree.leaves(state))
      >>> print(f"{held / (512 * 1024 + 1024):.2f} bytes a parameter")
      2.01 bytes a parameter
      >>> state.nu.codes["kernel"].dtype, state.nu.codes["bias"].dtype
      (dtype('uint8'), dtype('float32'))

    Sources: optimizer states in 8 bits under a shared scale, Dettmers et al., arXiv:2110.02861,
    2021; rounding at random, Gupta et al., arXiv:1502.02551, 2015. The code is our own.
    """
    return Q8(min_size=_checks.integer("min_size", min_size, 0), **_common(seed, exempt, axis_name))


def bfloat16(
    seed: int = 0,
    *,
    exempt: Callable[[str], bool] | None = None,
    axis_name: AxisName | None = None,
) -> Storage:
    """State in bfloat16, rounded at random: half the memory of float32.

    The mean of each number over seeds is that in float32. Where gradients keep arriving, its
    relative standard deviation is at most .01 at decay .9, .02 at .99 and .06 at .999. Where none
    does, each step rounds what is left once more: after k of them it is at most .004 sqrt(k), as a
    rule .0024 sqrt(k), which is .08 after 1,000 steps and .24 after 10,000. Its mean stays right;
    in 8 bits such numbers decay exactly. Updates are made of what is stored.

    Args:
      seed, exempt, axis_name: as :func:`q8`.

    Returns:
      A storage; each slot is an array of bfloat16.

    Raises:
      TypeError: as :func:`q8`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import low_memory, rmsprop
      >>> rmsprop(1e-3, storage=low_memory.bfloat16()).init(jnp.ones(3)).nu.dtype
      dtype(bfloat16)
    """
    return Bfloat16(**_common(seed, exempt, axis_name))


def _common(seed: Any, exempt: Any, axis_name: Any) -> dict[str, Any]:
    if exempt is not None and not callable(exempt):
        raise TypeError(f"exempt must be a function of a path or None, got {exempt!r}")
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be a name or a tuple of names or None, got {axis_name!r}")
    return {"seed": _checks.integer("seed", seed), "exempt": exempt, "axis_name": axis_name}

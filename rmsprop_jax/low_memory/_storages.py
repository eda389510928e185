"""The storages: which slot of which leaf is stored how, and how it advances."""

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

_TRACE = 2  # the number of the momentum slot


@dataclasses.dataclass(frozen=True, repr=False, kw_only=True)
class LowMemory(abc.ABC):
    """A storage that holds the slots of most leaves in fewer than 32 bits per element."""

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
        """A slot of a leaf that may be stored in fewer bits."""

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
            if draw.slot == _TRACE:  # NaN like its term, whose computation needs a root
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
        """The function that advances a slot stored in fewer bits; None for other slots."""
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
    """The slots of leaves of at least min_size elements in 8 bits, except means."""

    min_size: int

    def _small(self, param: jax.Array, value: Scalar, field: str) -> Slot:
        if math.prod(param.shape) < self.min_size:
            return FLOAT32.init(param, value)
        if field == "mu":  # its error in 8 bits would be as large as a variance
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
    """Stores the state in 8 bits per element: a quarter of the memory of float32.

    A second moment is stored with 6 bits for its octave and 2 for its position within the octave; a
    momentum value with a sign, 4 bits and 3. The whole leaf shares one scale. The mean of the
    centered form is stored as by :func:`bfloat16`, since its error in 8 bits would be as large as
    a variance.

    For a given sequence of gradients, the following is guaranteed relative to a float32 state:

    - Averaged over seeds, a second moment equals that in float32. So does the momentum of given
      steps.
    - The relative standard deviation of a second moment is at most .35: .16 at decay .9, .28 at
      .99, .31 at .999. An update has half that noise (7%, 14% and 16%), and is on average 1%, 3%
      and 4% longer.
    - Where no gradient arrives, second moments and momentum decay exactly.
    - A nonzero second moment never becomes 0. One that is more than 45 octaves (a factor of 3e13)
      below the largest in its leaf is raised to 45 octaves below it, so the update is too short,
      never too long.
    - In one step a second moment can grow to at most 18 octaves (a factor of 2.6e5) above the
      previous largest of its leaf. If it should grow more, it is stored at that limit, and the next
      steps make up 18 octaves each. Until then updates are longer than in float32, but never longer
      than learning_rate / sqrt(1 - decay), which bounds every update. So one gradient of 1e8 among
      gradients of size 1 does not change the updates of its neighbours. Those of its own element
      have half their usual size again after about 130 steps at decay .9, 1,400 at .99 and 14,000 at
      .999, where float32 takes 320, 3,100 and 29,000.
    - Parameters move by the momentum as it is stored. It can grow to at most 3 octaves (a factor of
      8) above the previous largest of its leaf: if the learning rate jumps up by more, updates are
      too short for a few steps. If steps are far below learning_rate / sqrt(1 - decay) from the
      start, as with a large eps, the first ones are noisy.
    - The noise of momentum accumulates: it is 11% of the root mean square of momentum at .9, 29% at
      .99, and as large as momentum itself at .999. Use :func:`bfloat16` for momentum above .99.

    The updates and losses of a run are not guaranteed to equal those in float32: each update
    differs at random.

    Args:
      min_size: leaves of fewer elements stay in float32.
      seed: seed of the stochastic rounding; any integer.
      exempt: function of a leaf's path, such as "layer/kernel"; a leaf for which it returns True
        stays in float32.
      axis_name: the axes of ``pmap`` or ``shard_map`` over which every leaf is sharded.

    Returns:
      A storage. The fields ``nu`` and ``trace`` of the state are NamedTuples of ``codes``, a tree
      like the parameters in uint8 or int8 (float32 for leaves stored so), and ``scales``, a vector
      with one element per leaf. Any shape and any sharding is supported.

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

    Sources: 8-bit optimizer states with a shared scale, Dettmers et al., arXiv:2110.02861, 2021;
    stochastic rounding, Gupta et al., arXiv:1502.02551, 2015. The code is our own.
    """
    return Q8(min_size=_checks.integer("min_size", min_size, 0), **_common(seed, exempt, axis_name))


def bfloat16(
    seed: int = 0,
    *,
    exempt: Callable[[str], bool] | None = None,
    axis_name: AxisName | None = None,
) -> Storage:
    """Stores the state in bfloat16 with stochastic rounding: half the memory of float32.

    Averaged over seeds, each number equals that in float32. Where gradients keep arriving, its
    relative standard deviation is at most .01 at decay .9, .02 at .99 and .06 at .999.

    Where no gradient arrives, each step rounds what remains once more. After k such steps the
    relative standard deviation is at most .004 sqrt(k), and typically .0024 sqrt(k), which is .08
    after 1,000 steps and .24 after 10,000; the mean stays right. In 8 bits such numbers decay
    exactly.

    Updates are computed from the stored state.

    Args:
      seed, exempt, axis_name: as in :func:`q8`.

    Returns:
      A storage; each slot is a bfloat16 array.

    Raises:
      TypeError: as in :func:`q8`.

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

"""One slot in 8 bits a number: a code each, an exponent a block, and a scale for all.

    value = scale * a,  a one of the 255 numbers that the exponent allows

To advance the average, value <- gamma value + r, does not touch the numbers that get nothing new:

    gamma scale = power * scale',  power a power of two, scale' in [1, 2)
    a' = power a + r / scale', rounded at random to one of its two neighbours

The numbers are float32 numbers of 4 significant bits. To round one at random is to add random bits
below the last that stays and to cut: its mean is then the number itself. Codes count the numbers
from the smallest of the block, and 0 is 0. Where no value is negative they span 32 octaves up to
the block's largest number, and what is below becomes the smallest, never 0. Where values have
signs, 16 octaves are left, and what is below becomes the smallest or 0, at random.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rmsprop_jax._arrays import clip, unfused
from rmsprop_jax._storage import Packed, full_like
from rmsprop_jax._types import Scalar
from rmsprop_jax.low_memory._blocks import view_of
from rmsprop_jax.low_memory._random import random_bits

_CUT = 20  # bits of a float32 below the sign, the 8 of the exponent, and 3 of the rest
_STEPS = 8  # numbers an octave
_LARGEST = float(jnp.finfo(jnp.float32).max)
_DTYPES = [["uint8", "uint8", "float32"], ["int8", "uint8", "float32"]]


@Packed.register
class EightBit(NamedTuple):
    """A slot whose last axis is in blocks.

    Attributes:
      codes: uint8 if no value is negative, int8 otherwise; the parameter's shape.
      exponents: uint8, one a block: the last axis is shorter. The exponent of a float32 number
        that no number of the block exceeds.
      scales: float32 in [1, 2), one for each leaf.
      leaf: which of them is this leaf's.
    """

    codes: jax.Array
    exponents: jax.Array
    scales: jax.Array
    leaf: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """That of the values."""
        found = [array.dtype.name for array in (self.codes, self.exponents, self.scales)]
        if found not in _DTYPES:
            raise TypeError(f"codes, exponents and scales must be of dtypes {_DTYPES}, got {found}")
        return self.scales.dtype

    def decode(self) -> jax.Array:
        return clip(self.scales[self.leaf] * _numbers(self), _LARGEST).reshape(self.shape)

    def encode(self, values: ArrayLike) -> "EightBit":
        """Each value rounded to the nearest number; what is not finite, or not allowed, to 0."""
        values = jnp.asarray(values, jnp.float32)
        values = jnp.where(jnp.isfinite(values), values, 0)
        a = (values if _signed(self) else jnp.maximum(values, 0)).reshape(_view(self))
        ones = self._replace(scales=jnp.ones_like(self.scales))
        with jax.numpy_dtype_promotion("standard"):  # as in an update
            return _rounded(ones, a, _max(abs(a)), jnp.int32(1 << (_CUT - 1)))


def eight_bit_like(param: jax.Array, value: Scalar, block: int, *, signed: bool) -> EightBit:
    """A slot full of value, which it holds exactly, placed like param; signed ones start at 0."""
    code, exponent, scale = _constant(jnp.asarray(0 if signed else value, jnp.float32))
    codes = full_like(param, code, jnp.int8 if signed else jnp.uint8)
    return EightBit(codes, per_block(param, block, exponent), scale[None], 0)


def per_block(like: jax.Array, block: int, value: Scalar) -> jax.Array:
    """An array of uint8 full of value, of a number a block, placed like another."""
    if block == 1:
        return full_like(like, value, jnp.uint8)
    if isinstance(like, jax.core.Tracer):
        zeros = full_like(like, 0, jnp.float32).reshape(view_of(like.shape, block))
        return full_like(jnp.min(zeros, (-2, -1)), value, jnp.uint8)
    shape = (*like.shape[:-1], like.shape[-1] // block)
    placed = isinstance(like, jax.Array) and like.committed  # or as free to move
    return jnp.full(shape, value, jnp.uint8, device=like.sharding if placed else None)


def accumulate_eight_bit(
    slot: EightBit,
    decay: jax.Array,
    term: jax.Array,
    bound: float | None,
    key: jax.Array,
    zero: jax.Array,
) -> tuple[jax.Array, EightBit]:
    """The product decay * slot, and the slot with term, where it is finite, added to it."""
    view = _view(slot)
    powers, scales = _power_and_scale(decay * slot.scales)
    power, scale = powers[slot.leaf], scales[slot.leaf]
    a, term = power * _numbers(slot), term.reshape(view)
    if bound is not None:
        a = clip(a, bound / 2)
    # No reduction over the new numbers: they would be kept for it in float32, 4 bytes each.
    most = _decode(_max(abs(slot.codes.reshape(view))), slot.exponents[..., None, None])
    top = power * most + _largest(term) / scale
    kept = unfused(jnp.where(jnp.isfinite(term), term, 0) * (1 / scale), zero)
    new = _rounded(slot._replace(scales=scales), a + kept, top, random_bits(key, view, _CUT))
    return unfused(scale * a, zero).reshape(slot.shape), new


def _numbers(slot: EightBit) -> jax.Array:
    """a, with its last axis split in blocks."""
    return _decode(slot.codes.reshape(_view(slot)), slot.exponents[..., None, None])


def _rounded(slot: EightBit, a: jax.Array, top: jax.Array, noise: jax.Array) -> EightBit:
    """The slot with other numbers: a, of size up to top, with noise added below what stays."""
    octaves = _octaves(slot.codes)
    # The exponent of top rounded up, so that no number is rounded beyond the last code.
    exponents = jnp.clip((_bits(top) + ((1 << _CUT) - 1)) >> 23, octaves + 1, 254)
    first = _STEPS * (exponents - octaves)
    bits = _bits(abs(a))
    codes = ((bits + noise) >> _CUT) - first
    if _signed(slot):
        smallest = _float((first + 1) << _CUT)
        some = noise.astype(jnp.float32) * (smallest / (1 << _CUT)) < abs(a)
        codes = jnp.where(abs(a) < smallest, some, jnp.minimum(codes, 127)) * jnp.sign(a)
    else:
        codes = jnp.clip(codes, jnp.minimum(bits, 1), 255)
    return slot._replace(
        codes=codes.astype(slot.codes.dtype).reshape(slot.shape),
        exponents=exponents[..., 0, 0].astype(jnp.uint8),
    )


def _decode(codes: jax.Array, exponents: jax.Array) -> jax.Array:
    count = codes.astype(jnp.int32)
    first = _STEPS * (exponents.astype(jnp.int32) - _octaves(codes))
    size = jnp.where(count == 0, 0, _float((abs(count) + first) << _CUT))
    return size if codes.dtype == jnp.uint8 else size * jnp.sign(count).astype(jnp.float32)


def _octaves(codes: jax.Array) -> int:
    """Octaves between the first number of a block and the last, whose exponent is kept."""
    return 15 if codes.dtype == jnp.int8 else 31


def _power_and_scale(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A power of two and a number in [1, 2) whose product is x; 0 and 1 for 0."""
    bits = _bits(x)
    return _float(bits & 0x7F800000), _float(bits & 0x007FFFFF | 0x3F800000)


@jax.jit
def _constant(value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The code, exponent and scale of a value that is not negative."""
    power, scale = _power_and_scale(value)
    exponent = jnp.clip(_bits(power) >> 23, 32, 254)
    first = _STEPS * (exponent - 31)
    code = jnp.clip((_bits(power) >> _CUT) - first, jnp.minimum(_bits(power), 1), 255)
    return code.astype(jnp.uint8), exponent.astype(jnp.uint8), scale


def _max(a: jax.Array) -> jax.Array:
    """The largest number of each block."""
    return jnp.max(jnp.max(a, -1, keepdims=True), -2, keepdims=True)


def _largest(x: jax.Array) -> jax.Array:
    """The largest size of a finite number of each block."""
    # Added so, the bits of what is not finite overflow to a negative number.
    shift = jnp.int32(1 << 23)
    bits = _max(_bits(abs(x)) + shift)
    return _float(lax.max(bits, shift) - shift)


def _view(slot: EightBit) -> tuple[int, ...]:
    return view_of(slot.shape, slot.shape[-1] // slot.exponents.shape[-1])


def _signed(slot: EightBit) -> bool:
    return slot.codes.dtype == jnp.int8


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

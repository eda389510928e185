"""One slot in 8 bits per element: a code for each, and one scale for all.

    value = scale * a,  a one of the 255 numbers that there are codes for

These numbers are 0 and float32 numbers with few significant bits. Stochastic rounding to them adds
random bits below the last bit that is kept, and truncates, so the mean is the number itself.

The average advances, value <- gamma value + r, without changing the bits of numbers to which
nothing is added, so those decay exactly:

    scale' = 2^k gamma scale,  a' = 2^-k a + r / scale', rounded stochastically

The integer k is the one for which scale' equals, within a factor of two, the largest of the old
numbers before it decays. Codes in uint8, for values that are never negative, have 3 significant
bits and 63 octaves, 18 of them above that number. Codes in int8 have a sign, 4 bits and 15 octaves,
3 of them above. A value above that range becomes the largest number. A value below it becomes the
smallest one; in int8, the smallest one or 0, at random.

So a step needs the largest of the old codes before it begins, and no other pass. If the largest is
0, so is the scale, which means that codes are powers of two, over as many octaves as there are
codes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from rmsprop_jax._arrays import clip, straight_through, unfused
from rmsprop_jax._mapped import max_over_mapped
from rmsprop_jax._storage import Copies, Draw, Lazy, Packed, full_like
from rmsprop_jax._types import Scalar
from rmsprop_jax.low_memory._random import random_bits

_EXPONENT = 23  # bits of a float32 below its exponent
_ONE = 127 << _EXPONENT  # the bits of 1
_LARGEST, _TINY = float(jnp.finfo(jnp.float32).max), float(jnp.finfo(jnp.float32).tiny)


class Format(NamedTuple):
    """The codes of a dtype.

    Attributes:
      cut: the bits of a float32 below the last one that is kept.
      one: the code of 1.
      zero: if codes are powers of two, the exponent of the power below that of code 1, in the bits
        of a float32.
    """

    cut: int
    one: int
    zero: int


_FORMATS = {"uint8": Format(21, 180, 0), "int8": Format(20, 96, 36)}


class Numbers(NamedTuple):
    """What codes stand for: code c is the float32 number with the bits first + (c << cut)."""

    first: jax.Array
    cut: jax.Array


@Packed.register
class EightBit(NamedTuple):
    """A slot in 8 bits.

    Attributes:
      codes: uint8 if no value is negative, int8 otherwise; has the parameter's shape.
      scales: float32, one for each leaf.
      leaf: the index of this leaf's scale.
      powers: for each leaf, the largest power of two in its numbers; only if a step is to follow.
    """

    codes: jax.Array
    scales: jax.Array
    leaf: Any
    powers: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.scales.dtype

    def decode(self) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # as in an update
            scale = _of(self.scales, self.leaf)
            a = _decoded(self.codes, _numbers(self.codes.dtype, scale))
            return clip(_factor(scale) * a, _LARGEST)

    def encode(self, values: ArrayLike) -> "EightBit":
        """Each value rounded to the nearest number; not finite or disallowed values become 0."""
        with jax.numpy_dtype_promotion("standard"):
            values = jnp.asarray(values, jnp.float32)
            values = jnp.where(jnp.isfinite(values), values, 0)
            values = values if _signed(self.codes) else jnp.maximum(values, 0)
            scale = _power(jnp.max(abs(values)))
            numbers = _numbers(self.codes.dtype, scale)
            half = jnp.int32(1) << (numbers.cut - 1)
            codes = _encoded(values / _factor(scale), values > 0, numbers, half, self.codes.dtype)
            return EightBit(codes, jnp.asarray(self.scales).at[self.leaf].set(scale), self.leaf)


def eight_bit_like(param: jax.Array, value: Scalar, *, signed: bool) -> EightBit:
    """A slot full of value, which it holds exactly, placed like param. Signed slots start at 0."""
    scale = jnp.asarray(0 if signed else value, jnp.float32)
    dtype = jnp.dtype(jnp.int8 if signed else jnp.uint8)
    code = jnp.where(scale > 0, _FORMATS[dtype.name].one, 0).astype(dtype)
    return EightBit(full_like(param, code, dtype), scale[None], np.int32(0))


@jax.jit
def powers_of(codes: Sequence[jax.Array], scales: jax.Array) -> jax.Array:
    """For each leaf, the largest power of two in its numbers; 0 for zeros and without codes."""
    (dtype,) = {code.dtype for code in codes if code.dtype.name in _FORMATS}
    most = jnp.stack([_largest(code) if code.dtype == dtype else jnp.int32(0) for code in codes])
    return _power(_decoded(max_over_mapped(most), _numbers(dtype, scales)))


def accumulate_eight_bit(
    slot: EightBit,
    decay: jax.Array,
    term: Lazy,
    bound: float | None,
    draw: Draw,
    key: jax.Array,
) -> tuple[Copies, EightBit]:
    """The sum decay * slot + term, as float32 and as a slot; if signed, as the slot holds it."""
    codes, scales, leaf, powers = slot
    assert powers is not None
    zero = draw.step >> 31  # step is never negative
    # Scalars are computed for all leaves at once. shrink is 2^-k. If the largest number of the past
    # is 0, or becomes 0, nothing of the past stays.
    scale = _factor(scales)
    decayed = lax.min(decay * scale, jnp.float32(_LARGEST))
    held, octave = scale * powers, _power(decay)
    octave = octave * jnp.where(held > _LARGEST / 4, 2, 1)  # otherwise the scale could be infinite
    stays = decayed * powers >= _TINY
    shrink = jnp.where(stays, lax.min(octave / powers, jnp.float32(_LARGEST)), 0)
    first = jnp.float32(0)
    if draw.size is not None:
        first = jnp.where(
            draw.size < jnp.inf, lax.max(_power(draw.size), jnp.float32(_TINY)), _TINY
        )
    new_scales = lax.stop_gradient(jnp.where(stays, decay / octave * held, first))
    inverse = 1 / _factor(new_scales)

    a = _decoded(codes, _numbers(codes.dtype, _of(scales, leaf)))
    past = unfused(_of(decayed, leaf) * a, zero)
    if bound is not None:
        past = clip(past, bound)
    added = term()
    new = _numbers(codes.dtype, _of(new_scales, leaf))
    positive = ((codes > 0) & _of(stays, leaf)) | (added > 0)
    a = _of(shrink, leaf) * a + unfused(added * _of(inverse, leaf), zero)
    noise = random_bits(key, codes, new.cut)
    slot = EightBit(_encoded(a, positive, new, noise, codes.dtype), new_scales, leaf)

    def value(_: int) -> jax.Array:
        exact = past + term()
        if _signed(codes):
            return straight_through(slot.decode(), exact)
        # For second moments the exact sum is better, and as fast. XLA:CPU keeps fewer copies if the
        # new codes have to be computed first.
        return exact + zero.astype(jnp.float32) * slot.codes.astype(jnp.float32)

    return value, slot


def _of(vector: jax.Array, leaf: Any) -> jax.Array:
    return lax.dynamic_index_in_dim(jnp.asarray(vector), leaf, keepdims=False)


def _numbers(dtype: jnp.dtype, scale: jax.Array) -> Numbers:
    """What the codes of a dtype stand for under a scale."""
    cut, one, zero = _FORMATS[dtype.name]
    first = jnp.where(scale > 0, jnp.int32(_ONE - (one << cut)), jnp.int32(zero << _EXPONENT))
    return Numbers(first, jnp.where(scale > 0, jnp.int32(cut), jnp.int32(_EXPONENT)))


def _factor(scale: jax.Array) -> jax.Array:
    """The factor by which numbers are to be multiplied."""
    return jnp.where(scale > 0, scale, 1)


def _decoded(codes: jax.Array, numbers: Numbers) -> jax.Array:
    count = codes.astype(jnp.int32)
    bits = numbers.first + (abs(count) << numbers.cut)
    if _signed(codes):
        bits = bits | (count & jnp.iinfo(jnp.int32).min)
    return jnp.where(count == 0, 0, _float(bits))


def _encoded(
    a: jax.Array, positive: jax.Array, numbers: Numbers, noise: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """The codes of a, with noise added below the last bit that is kept; unsigned, only 0 becomes 0.

    The last operation takes two arrays: XLA:CPU would recompute the result of a loop over one array
    wherever it is used.
    """
    first, cut = numbers
    codes = (_bits(abs(a)) - first + noise) >> cut
    if dtype == jnp.int8:
        smallest = _float(first + (1 << cut))
        some = noise.astype(jnp.float32) * (smallest / (1 << cut)) < abs(a)
        codes = jnp.where(abs(a) < smallest, some, jnp.minimum(codes, 127)).astype(dtype)
        return jnp.where(a < 0, -codes, codes)
    return lax.max(jnp.clip(codes, 0, 255).astype(dtype), positive.astype(dtype))


def _largest(codes: jax.Array) -> jax.Array:
    """The largest absolute value of a code."""
    largest = jnp.max(codes).astype(jnp.int32)
    if _signed(codes):  # XLA:CPU would store an array of absolute values
        largest = lax.max(largest, -jnp.min(codes).astype(jnp.int32))
    return largest


def _signed(codes: jax.Array) -> bool:
    return codes.dtype == jnp.int8


def _power(a: jax.Array) -> jax.Array:
    """The largest power of two that is at most a, which is not negative; 0 for 0."""
    return _float(_bits(a) & 0x7F800000)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)

"""A float32 number, split into a bfloat16 number and the correction that completes it.

All computation is on ordinals: the float32 numbers, numbered in their order from 0 for 0. The upper
16 bits of an ordinal are that of a bfloat16 number, and the others make up the correction:

    ordinal(master) = 2^16 ordinal(parameter) + 2^drop correction,  drop = 32 - bits

The parameter is the master weight rounded to nearest.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._arrays import clip, straight_through, unfused
from rmsprop_jax._storage import Draw
from rmsprop_jax.low_memory._random import random_bits, random_key

CORRECTIONS: dict[int, Any] = {16: None, 24: jnp.int8, 32: jnp.int16}  # their dtypes, by bits
_SLOT = 3  # for the random bits; a rule uses 0, 1 and 2
_INFINITY = 0x7F80  # the ordinal of the bfloat16 number
_LARGEST = float(jnp.finfo(jnp.float32).max)


@jax.jit
def joined(param: jax.Array, correction: jax.Array | None) -> jax.Array:
    """The master weight; a parameter that is not finite is its own master weight."""
    # Bits are moved, not numbers converted: XLA may remove a conversion there and back.
    upper = _ordinals(param)
    whole = upper << 16
    if correction is not None:
        shift = 16 - jnp.iinfo(correction.dtype).bits
        whole += jnp.where(abs(upper) < _INFINITY, correction.astype(jnp.int32) << shift, 0)
    return straight_through(_numbers(whole), lax.convert_element_type(param, jnp.float32))


@functools.partial(jax.jit, static_argnames=("bits", "seed"))
def moved(
    param: jax.Array,
    correction: jax.Array | None,
    master: jax.Array,
    update: jax.Array,
    count: jax.Array,
    leaf: jax.Array,
    bits: int,
    seed: int,
) -> tuple[jax.Array, jax.Array | None]:
    """The update of a parameter, and the correction after it.

    A master weight that is not finite becomes the update, and leaves the correction unchanged.
    """
    update = update.astype(jnp.float32)
    new = master + unfused(update, count >> 31)
    finite = jnp.isfinite(new)
    drop = 32 - bits
    key = random_key(seed, None, Draw(count, leaf, _SLOT, lambda: count))
    noise = random_bits(key, new, drop) if drop else 0
    held, nearest = _split(new, noise, bits)

    old = _numbers(_ordinals(param) << 16)
    step = clip(_numbers(nearest << 16) - old, _LARGEST)
    if correction is not None:
        rest = _rest(held, nearest, bits)
        correction = jnp.where(finite, rest.astype(correction.dtype), correction)
        # XLA:CPU keeps fewer copies if the new corrections have to be computed first.
        zero = (count >> 31).astype(jnp.float32)
        step = step + zero * correction.astype(jnp.float32)
    return straight_through(jnp.where(finite, step, new), update), correction


@functools.partial(jax.jit, static_argnames="bits")
def parted(weight: jax.Array, bits: int) -> tuple[jax.Array, jax.Array | None]:
    """The parameter and the correction of a master weight."""
    weight = jnp.asarray(weight, jnp.float32)
    finite = jnp.isfinite(weight)
    held, nearest = _split(weight, (1 << (32 - bits)) >> 1, bits)
    param = jnp.where(finite, _numbers(nearest << 16), weight).astype(jnp.bfloat16)
    if bits == 16:
        return param, None
    return param, jnp.where(finite, _rest(held, nearest, bits), 0).astype(CORRECTIONS[bits])


def _split(master: jax.Array, noise: Any, bits: int) -> tuple[jax.Array, jax.Array]:
    """The ordinal of a master weight, cut to bits, and that of the nearest bfloat16 number."""
    held = (_ordinals(master) + noise) >> (32 - bits)
    low = bits - 16
    nearest = (held + ((1 << low) >> 1)) >> low
    return held, jnp.clip(nearest, 1 - _INFINITY, _INFINITY - 1)


def _rest(held: jax.Array, upper: jax.Array, bits: int) -> jax.Array:
    """What the ordinal of a bfloat16 number lacks, as far as a correction can hold it."""
    low = bits - 16
    half = 1 << (low - 1)
    return jnp.clip(held - (upper << low), -half, half - 1)


def _ordinals(x: jax.Array) -> jax.Array:
    """The ordinals of numbers, as int32: for positive numbers, these are their bits."""
    dtype = np.dtype(f"int{jnp.finfo(x.dtype).bits}")
    bits = lax.bitcast_convert_type(x, dtype).astype(jnp.int32)
    return jnp.where(bits < 0, -(bits & np.iinfo(dtype).max), bits)


def _numbers(ordinals: jax.Array) -> jax.Array:
    """The float32 numbers of ordinals."""
    sign = np.int32(np.iinfo(np.int32).min)
    return lax.bitcast_convert_type(jnp.where(ordinals < 0, sign - ordinals, ordinals), jnp.float32)

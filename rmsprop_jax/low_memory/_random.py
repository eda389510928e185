"""Random bits without a key in the state: a hash of the step, leaf, slot and position.

Positions are counted over the whole array, so the bits are the same however it is sharded.
"""

import math
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._storage import Draw

AxisName = str | tuple[str, ...]


def random_key(seed: int, axis_name: AxisName | None, draw: Draw) -> jax.Array:
    """A number for one slot of one leaf in one step; for each shard, too, if axis_name is given."""
    whole = np.uint32(zlib.crc32(str(seed).encode()))  # the seed may be of any size
    words = [whole, draw.leaf, draw.step.astype(jnp.uint32), np.uint32(draw.slot)]
    if axis_name is not None:
        words.append(lax.axis_index(axis_name).astype(jnp.uint32))
    mixed = jnp.uint32(0)
    for word in words:
        mixed = _mix(mixed ^ word)
    return mixed


def random_bits(key: jax.Array, like: jax.Array, count: int | jax.Array) -> jax.Array:
    """Uniform integers from 0 to 2^count - 1, as int32 with the shape and sharding of like."""
    place = jnp.zeros((), jnp.uint32)
    shape, sharding = like.shape, jax.typeof(like).sharding
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32  # between neighbours, in memory
        number = lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
        place = place + number * np.uint32(stride)
    return (_mix(place ^ key) >> jnp.uint32(32 - count)).astype(jnp.int32)


def _mix(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit integers in which each bit of x flips about half of the bits.

    The shifts and factors are those of Chris Wellons' lowbias32
    (nullprogram.com/blog/2018/07/31), without its last shift, which only affects the low bits.
    """
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    return (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)

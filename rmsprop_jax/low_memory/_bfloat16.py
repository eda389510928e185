"""One slot in bfloat16, rounded at random so that its mean is what was to be stored."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._arrays import clip, unfused
from rmsprop_jax.low_memory._random import random_bits

_CUT = 16  # bits of a float32 that a bfloat16 has not
_LARGEST = float(jnp.finfo(jnp.bfloat16).max)


def accumulate_bfloat16(
    slot: jax.Array,
    decay: jax.Array,
    term: jax.Array,
    bound: float | None,
    key: jax.Array,
    zero: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The product decay * slot, and the slot with term, where it is finite, added to it."""
    past = unfused(decay * slot.astype(jnp.float32), zero)
    if bound is not None:
        past = clip(past, bound)
    kept = jnp.where(jnp.isfinite(term), term, 0)
    return past, _rounded(past + kept, random_bits(key, slot.shape, _CUT))


def _rounded(x: jax.Array, noise: jax.Array) -> jax.Array:
    """One of the two neighbours of x, the nearer the more often: noise is added and cut off."""
    bits = lax.bitcast_convert_type(clip(x, _LARGEST), jnp.int32) + noise
    return lax.bitcast_convert_type((bits >> _CUT).astype(np.uint16), jnp.bfloat16)

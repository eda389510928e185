"""One slot in bfloat16, with stochastic rounding, so that its mean is exact."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._arrays import clip, once, straight_through, unfused
from rmsprop_jax._storage import Copies, Draw, Lazy
from rmsprop_jax.low_memory._random import random_bits

_CUT = 16  # bits of a float32 that a bfloat16 lacks
_LARGEST = float(jnp.finfo(jnp.bfloat16).max)


def accumulate_bfloat16(
    slot: jax.Array,
    decay: jax.Array,
    term: Lazy,
    bound: float | None,
    draw: Draw,
    key: jax.Array,
) -> tuple[Copies, jax.Array]:
    """The rounded sum decay * slot + term, as float32 and as a slot."""
    zero = draw.step >> 31  # step is never negative

    def exact(slot: jax.Array) -> jax.Array:
        past = unfused(decay * slot.astype(jnp.float32), zero)
        if bound is not None:
            past = clip(past, bound)
        return past + term()

    def advanced(slot: jax.Array) -> jax.Array:
        return _rounded(exact(slot), random_bits(key, slot, _CUT))

    new = lax.platform_dependent(
        slot, cpu=lambda slot: once(advanced, slot, zero), default=advanced
    )
    return lambda _: straight_through(new.astype(jnp.float32), exact(slot)), new


def _rounded(x: jax.Array, noise: jax.Array) -> jax.Array:
    """One of the two neighbours of x, the nearer one more often: noise is added, then truncated."""
    bits = lax.bitcast_convert_type(clip(x, _LARGEST), jnp.int32) + noise
    return lax.bitcast_convert_type((bits >> _CUT).astype(np.uint16), jnp.bfloat16)

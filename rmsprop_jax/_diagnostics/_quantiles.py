"""Quantiles of all numbers of a tree, without putting them into one array or sorting them."""

from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._arrays import share_of, straight_through


def count(flags: jax.Array, exact: bool = True) -> jax.Array:
    """How many are true, as int32; as float32, if there may be more than that can count."""
    if exact and flags.size < 2**31:
        return jnp.sum(flags, dtype=jnp.int32)
    return share_of(flags, jnp.dtype(jnp.float32)) * np.float32(flags.size)


def _not_above(x: jax.Array, bounds: jax.Array, exact: bool) -> jax.Array:
    """For each bound, how many of x are not above it."""

    def by_sums(x: jax.Array, bounds: jax.Array) -> jax.Array:
        return jax.vmap(lambda bound: count(x <= bound, exact))(bounds)

    def at_once(x: jax.Array, bounds: jax.Array) -> jax.Array:
        # For a single sum XLA:CPU keeps all that is added, but not for several in one loop.
        flags = tuple((x <= bounds[i]).astype(np.int32) for i in range(len(bounds)))
        zeros = (np.int32(0),) * len(flags)
        add = lambda a, b: tuple(y + z for y, z in zip(a, b, strict=True))  # noqa: E731
        return jnp.stack(lax.reduce(flags, zeros, add, range(x.ndim)))

    if not exact or x.ndim == 0:
        return by_sums(x, bounds)
    return lax.platform_dependent(x, bounds, cpu=at_once, default=by_sums)


def quantiles(arrays: Sequence[jax.Array], percents: Sequence[int]) -> jax.Array:
    """For each percentage, from 1 to 100, the smallest number that so many of all do not exceed.

    That is what ``numpy.percentile`` gives with ``method="inverted_cdf"``. Numbers must not be
    negative; those that are infinite or NaN are left out, and of no numbers the result is NaN.

    The bits of a float, read as an integer, grow with it. So the bits of the result are found one
    by one, from the highest down, by counting the numbers that are not above. This takes 31 passes
    over the numbers (63 in float64) and one array of integers like each of them, but no sorting;
    several devices exchange counts alone. The derivatives are those of the number that is found.
    """
    percent = np.array(percents, np.int32)
    dtype = jnp.result_type(*arrays)
    width = jnp.finfo(dtype).bits
    integer = np.dtype(f"int{width}")
    numbers = [x.astype(dtype) for x in arrays]
    beyond = np.array(np.inf, dtype).view(integer)
    bits = [lax.bitcast_convert_type(lax.stop_gradient(lax.abs(x)), integer) for x in numbers]
    exact = sum(x.size for x in arrays) < 2**31

    def not_above(bounds: jax.Array) -> jax.Array:
        counts: list[jax.Array] = [_not_above(x, bounds, exact) for x in bits]
        return sum(counts[1:], counts[0])

    n = not_above(jnp.asarray(beyond - 1)[None])[0]
    if exact:  # in integers, without overflow
        rank = n // 100 * percent + -(-(n % 100 * percent) // 100)
    else:
        rank = jnp.ceil(n * (percent.astype(np.float32) / np.float32(100)))

    def bit(i: jax.Array, found: jax.Array) -> jax.Array:
        step = jnp.asarray(1, integer) << (width - 2 - i).astype(integer)
        enough = not_above(found + (step - 1)) >= rank
        return jnp.where(enough, found, found + step)

    found = lax.fori_loop(0, width - 1, bit, jnp.zeros(percent.shape, integer))

    def mean(one: jax.Array) -> jax.Array:
        equal = [jnp.sum(jnp.where(x == one, y, 0)) for x, y in zip(bits, numbers, strict=True)]
        counts: list[jax.Array] = [count(x == one, exact) for x in bits]
        return sum(equal[1:], equal[0]) / sum(counts[1:], counts[0]).astype(dtype)

    values = lax.bitcast_convert_type(found, dtype)
    return straight_through(jnp.where(n > 0, values, np.nan), jax.vmap(mean)(found))

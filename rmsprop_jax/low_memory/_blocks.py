"""Blocks along the last axis: how long they are, and whether they fit the shards."""

import functools
import math

import jax

_WINDOW = 32  # XLA reduces longer runs in two steps, and keeps a whole array in between


def block_of(n: int, block: int) -> int:
    """The length of the blocks of an axis of n: a divisor of n from block / 2 to block.

    Of several, the one whose number of blocks shares the largest divisor with 8, then the longest.
    If there is none, the smallest divisor above: n itself if it is prime.
    """
    divisors = _divisors(n)
    near = [d for d in divisors if block / 2 <= d <= block]
    if near:
        return max(near, key=lambda d: (math.gcd(n // d, 8), d))
    return min(d for d in (*divisors, n) if d > block or d == n)


def view_of(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The shape with its last axis split in blocks, and those in two."""
    window = max(d for d in _divisors(block) if d <= _WINDOW)
    return (*shape[:-1], shape[-1] // block, block // window, window)


def divides_shards(param: jax.Array, block: int) -> bool:
    """Whether blocks divide the shards of an array, as far as its sharding is known."""
    return _shard(param) % block == 0


def check_shards(param: jax.Array, block: int, asked: int, path: str) -> None:
    """Refuses blocks that do not fit, and says which do."""
    if divides_shards(param, block):
        return
    n, shard = param.shape[-1], _shard(param)
    # Between these, more or less makes no other blocks.
    tries = {b for d in _divisors(n) for b in (d, 2 * d - 1, 2 * d)}
    fitting = [b for b in tries if shard % block_of(n, b) == 0]
    best = min(fitting, key=lambda b: abs(math.log(block_of(n, b) / asked)))
    raise ValueError(
        f"q8: the last axis of parameter {path!r}, of shape {param.shape}, is sharded in pieces of "
        f"{shard}, which its blocks of {block} do not divide: q8(block={best}) makes blocks of "
        f"{block_of(n, best)}, which do; or exempt the parameter"
    )


def _shard(param: jax.Array) -> int:
    """How much of its last axis a device has."""
    typed = jax.typeof(param) if isinstance(param, jax.core.Tracer) else param
    sharding = getattr(typed, "sharding", None)
    mapped = getattr(getattr(sharding, "mesh", None), "manual_axes", ())
    if sharding is None or mapped:  # the shape is a shard's already
        return param.shape[-1]
    return sharding.shard_shape(param.shape)[-1]


@functools.cache
def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})

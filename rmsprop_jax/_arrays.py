"""Operations on one array, real or complex."""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


def abs2(z: jax.Array) -> jax.Array:
    """|z|^2, real."""
    return lax.square(z.real) + lax.square(z.imag) if jnp.iscomplexobj(z) else lax.square(z)


def clip(z: jax.Array, bound: float) -> jax.Array:
    """The array z with its real and imaginary parts within [-bound, bound]; NaN stays NaN."""
    number = jnp.finfo(z.dtype).dtype.type
    return by_parts(lambda part: lax.clamp(number(-bound), part, number(bound)), z)


def by_parts(f: Callable[..., jax.Array], *zs: jax.Array) -> jax.Array:
    """The value of f on real arrays; on real and imaginary parts separately if one is complex.

    A real array then serves as both parts.
    """
    if not any(map(jnp.iscomplexobj, zs)):
        return f(*zs)
    imaginary = (z.imag if jnp.iscomplexobj(z) else z for z in zs)
    return lax.complex(f(*(z.real for z in zs)), f(*imaginary))


def widen(z: Any, real: jnp.dtype) -> jax.Array:
    """The array z in the precision of the arithmetic; it stays real or complex."""
    return z.astype(jnp.result_type(real, jnp.complex64) if jnp.iscomplexobj(z) else real)


def narrow(z: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The array z as dtype; a value beyond the range of dtype becomes its largest number."""
    largest = float(jnp.finfo(dtype).max)
    return (clip(z, largest) if largest < float(jnp.finfo(z.dtype).max) else z).astype(dtype)


def unfused(x: jax.Array, zero: jax.Array) -> jax.Array:
    """The array x minus zero, an int32 scalar 0 that the compiler does not know to be 0.

    The compiler may fuse a product x with this difference, which skips no rounding. It cannot fuse
    it with a sum that follows, which would skip one, in one program but not in another. So x is
    bit-identical in both. (Minus 0 rather than plus 0: -0 stays -0.)
    """
    return x - zero.astype(x.dtype)


def once(f: Callable[[jax.Array], jax.Array], x: jax.Array, zero: jax.Array) -> jax.Array:
    """The value f(x), in a branch that the compiler does not know to be always taken.

    XLA:CPU then writes it in place of x, and does not compute it again where it is used. zero is
    as in unfused.
    """
    return lax.cond(zero == 0, f, lambda x: x, x)


@jax.custom_jvp
def straight_through(x: jax.Array, exact: jax.Array) -> jax.Array:  # noqa: ARG001
    """The array x, with the derivatives of exact, from which it was rounded."""
    return x


@straight_through.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]


def share_of(flags: jax.Array, real: jnp.dtype) -> jax.Array:
    """The fraction of flags that is true; 0 if there are none."""

    def mean(flags: jax.Array) -> jax.Array:
        return jnp.sum(flags.astype(real)) / real.type(max(flags.size, 1))

    return lax.platform_dependent(flags, cpu=lambda flags: _counted(flags, real), default=mean)


def _counted(flags: jax.Array, real: jnp.dtype) -> jax.Array:
    """The same. XLA:CPU stores the operands of a single sum, but not of two sums in one loop."""
    true = flags.astype(jnp.int32)
    # What int32 cannot count is added in floating point.
    counted = [axis for axis in range(flags.ndim) if math.prod(flags.shape[axis:]) < 2**31]
    counts = lax.reduce(
        (true, 1 - true),
        (np.int32(0), np.int32(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        counted,
    )
    yes, no = (jnp.sum(count.astype(real)) for count in counts)
    return yes / lax.max(yes + no, real.type(1))

"""Operations on one array that is real or complex."""

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
    """The value of f on real arrays; of the real and of the imaginary parts, if one is complex.

    A real array then counts for both.
    """
    if not any(map(jnp.iscomplexobj, zs)):
        return f(*zs)
    imaginary = (z.imag if jnp.iscomplexobj(z) else z for z in zs)
    return lax.complex(f(*(z.real for z in zs)), f(*imaginary))


def widen(z: Any, real: jnp.dtype) -> jax.Array:
    """The array z in the precision of the arithmetic, real or complex as it was."""
    return z.astype(jnp.result_type(real, jnp.complex64) if jnp.iscomplexobj(z) else real)


def narrow(z: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The array z as dtype; what is beyond its range becomes its largest number."""
    largest = float(jnp.finfo(dtype).max)
    return (clip(z, largest) if largest < float(jnp.finfo(z.dtype).max) else z).astype(dtype)


def unfused(x: jax.Array, zero: jax.Array) -> jax.Array:
    """The array x, where zero is an int32 scalar 0 of which the compiler does not know that.

    So it can fuse the product x with this difference, which leaves out no rounding, but not with a
    sum that follows, which would: in one program but not in another. It then has the same bits in
    both. (Less 0, and not plus: -0 stays -0.)
    """
    return x - zero.astype(x.dtype)


def once(f: Callable[[jax.Array], jax.Array], x: jax.Array, zero: jax.Array) -> jax.Array:
    """The value f(x), where zero is as in unfused: in a branch of which the compiler does not know
    that it is always taken.

    XLA:CPU then writes it in the place of x, and does not compute it again where it is used.
    """
    return lax.cond(zero == 0, f, lambda x: x, x)


@jax.custom_jvp
def straight_through(x: jax.Array, exact: jax.Array) -> jax.Array:  # noqa: ARG001
    """The array x, with the derivatives of what it was rounded from."""
    return x


@straight_through.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]


def share_of(flags: jax.Array, real: jnp.dtype) -> jax.Array:
    """Which part of them is true; 0 of none."""

    def mean(flags: jax.Array) -> jax.Array:
        return jnp.sum(flags.astype(real)) / real.type(max(flags.size, 1))

    return lax.platform_dependent(flags, cpu=lambda flags: _counted(flags, real), default=mean)


def _counted(flags: jax.Array, real: jnp.dtype) -> jax.Array:
    """The same. For a single sum XLA:CPU keeps all that is added, but not for two in one loop."""
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

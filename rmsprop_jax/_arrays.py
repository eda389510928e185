"""Operations on one array that is real or complex."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


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


@jax.custom_jvp
def settled(x: jax.Array, zero: jax.Array) -> jax.Array:
    """The array x, where zero is an int32 scalar 0 of which the compiler does not know that.

    So it cannot fuse the product x with a sum that follows, which would leave out a rounding: in
    one program but not in another. It then has the same bits in both.
    """
    integer = {4: jnp.int32, 8: jnp.int64}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, integer) ^ zero.astype(integer)
    return lax.bitcast_convert_type(bits, x.dtype)


@settled.defjvp
def _settled_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    return settled(*primals), tangents[0]

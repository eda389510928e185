"""Which rows a batch touches, and what it adds to each."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._leaves import describe


def places(indices: Any, rows: int) -> jax.Array:
    """Indices as an int32 vector; an index of no row becomes the number of rows."""
    if not hasattr(indices, "dtype") or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be an array of integers, got {describe(indices)}")
    if not isinstance(indices, jax.core.Tracer):
        known = np.asarray(indices)
        wrong = (known < 0) | (known > rows)
        if wrong.any():
            at = tuple(map(int, np.argwhere(wrong)[0]))
            raise ValueError(
                f"indices must be from 0 to {rows - 1}, or {rows} for no row, got {known[at]} "
                f"at {list(at)}"
            )
    return _in_one_row(indices, rows)


@functools.partial(jax.jit, static_argnums=1)
def _in_one_row(indices: jax.Array, rows: int) -> jax.Array:
    indices = indices.ravel()
    # Compared in their own dtype, which may not be able to hold the number of rows.
    if rows > jnp.iinfo(indices.dtype).max:
        inside = indices >= 0
    else:
        inside = (indices >= 0) & (indices < jnp.asarray(rows, indices.dtype))
    return jnp.where(inside, indices.astype(jnp.int32), jnp.int32(rows))


@functools.partial(jax.jit, static_argnums=2)
def summed(indices: jax.Array, grads: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Each touched row once, in order, and the sum of its gradients.

    The places that repetitions leave are at the end, with distinct indices beyond the table.
    """
    size = indices.size
    each, segment = jnp.unique(indices, size=size, fill_value=rows, return_inverse=True)
    each = jnp.where(each < rows, each, rows + jnp.arange(size, dtype=jnp.int32))
    return each, jax.ops.segment_sum(grads, segment.ravel(), size)

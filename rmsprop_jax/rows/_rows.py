"""The public functions for steps on the rows that a batch touches."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from rmsprop_jax import _checks
from rmsprop_jax._arrays import widen
from rmsprop_jax._leaves import describe, leaf_type
from rmsprop_jax._rule import RMSPropState
from rmsprop_jax._storage import full_like
from rmsprop_jax.rows._state import RowsState, check, checked, checked_table, rule_of
from rmsprop_jax.rows._steps import advanced, settled, stepped
from rmsprop_jax.rows._touched import places


def init(
    tx: optax.GradientTransformation,
    table: ArrayLike,
    inner: RMSPropState | None = None,
    *,
    lazy: bool = False,
) -> RowsState:
    """Creates the state of a table, before its first step.

    Args:
      tx: what ``rmsprop``, ``scale_by_rms`` or a dialect returns, not wrapped in anything.
      table: array of rows, of shape (n, ...); float32, float64 or complex.
      inner: a state of tx for the whole table, to continue from dense steps; None for that of
        ``tx.init``.
      lazy: whether rows take only the steps that touch them.

    Returns:
      A :class:`RowsState`, whose arrays have the shape and placement of the table, and 4 more bytes
      per row for its steps; without these if lazy.

    Raises:
      TypeError: if tx is anything else, or if table is not such an array.
      ValueError: if tx cannot be applied to single rows: if it is cautious or has a storage. If not
        lazy, also with a scheduled decay or momentum, with a scheduled learning rate after momentum
        (``lr_in_momentum=False``), with coupled weight decay, or with decoupled weight decay and a
        schedule. If lazy, also with bias correction.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, rows
      >>> state = rows.init(rmsprop(0.1), jnp.ones((5, 2)))
      >>> print(state.inner.nu.shape, state.steps)
      (5, 2) [0 0 0 0 0]
    """
    table = checked_table(table)
    rule = rule_of(tx, _checks.flag("lazy", lazy))
    if inner is None:
        inner = tx.init(table)
    check(rule, inner, table)
    if lazy:
        return RowsState(inner, None)
    by_rows = jnp.any(table != table, axis=tuple(range(1, table.ndim)))  # placed like rows
    return RowsState(inner, full_like(by_rows, inner.count, jnp.int32))


def update(
    tx: optax.GradientTransformation,
    indices: jax.Array | np.ndarray,
    row_grads: ArrayLike,
    table: ArrayLike,
    state: RowsState,
) -> tuple[jax.Array, RowsState]:
    """Takes a step on the rows that a batch touches.

    Args:
      tx: the transformation that ``init`` was called with.
      indices: integers of any shape and dtype: the rows of the batch, possibly repeated. The number
        of rows, n, stands for no row. Inside jit so does every index below 0 or above n.
      row_grads: floating or complex array of shape ``indices.shape + table.shape[1:]``, the
        gradient with respect to ``table[indices]``. Gradients of the same row are added.
      table: array of rows.
      state: the state after the last step.

    Returns:
      The table and the state after the step. Schedules, such as that of the learning rate, are
      evaluated at the number of the step, which counts all calls.

    Raises:
      TypeError, ValueError: as in :func:`init`; if indices are not integers; if one of them is
        known to be below 0 or above n; if the state belongs to another table or transformation.
      AssertionError: raised by chex if row_grads have another shape, or are complex while the table
        is not.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, rows
      >>> tx, table = rmsprop(0.1), jnp.ones((5, 2))
      >>> indices, row_grads = jnp.array([3, 0, 3]), jnp.ones((3, 2))
      >>> table, state = rows.update(tx, indices, row_grads, table, rows.init(tx, table))
      >>> print(table[:, 0], state.inner.nu[:, 0], state.steps)
      [0.6837722 1.        1.        0.6837722 1.       ] [0.1 0.  0.  0.4 0. ] [1 0 0 1 0]

    Sources: TensorFlow's ``SparseApplyRMSProp`` for the lazy meaning; our own derivation, from the
    closed form of the rule for gradients of 0, for the dense one.
    """
    rule, table = checked(tx, table, state)
    at = _places(indices, table)
    return stepped(rule, at, _gradients(row_grads, indices, table), table, state)


def advance(
    tx: optax.GradientTransformation,
    indices: jax.Array | np.ndarray,
    table: ArrayLike,
    state: RowsState,
) -> tuple[jax.Array, RowsState]:
    """Brings some rows up to date, so that a forward pass sees what it would with dense steps.

    With momentum b, and q = 1 - learning_rate weight_decay if that is decoupled, else 1, k steps
    without a gradient are

        x <- q^k x - b (q^(k-1) momentum + ... + momentum^k),  b <- momentum^k b,  s <- decay^k s

    Rows move by themselves only with momentum or decoupled weight decay. Without these all rows are
    up to date, and there is no need to call this function.

    Args:
      tx: the transformation that ``init`` was called with.
      indices: those of the rows, as in :func:`update`.
      table: array of rows.
      state: the state after the last step.

    Returns:
      The table and the state, after the same number of steps.

    Raises:
      TypeError, ValueError: as in :func:`update`; also if the state is lazy.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, rows
      >>> tx, table = rmsprop(0.1, momentum=0.5), jnp.ones(3)
      >>> state = rows.init(tx, table)
      >>> for i in ([0], [1], [2]):
      ...     table, state = rows.update(tx, jnp.array(i), jnp.ones(1), table, state)
      >>> print(table)  # as they were left, each after a step of .316
      [0.6837722 0.6837722 0.6837722]
      >>> table, state = rows.advance(tx, jnp.array([0, 1]), table, state)
      >>> print(table.round(4))  # half a step and a quarter later; half a step later
      [0.4466 0.5257 0.6838]
    """
    rule, table = checked(tx, table, state, lazy=False)
    return advanced(rule, _places(indices, table), table, state)


def settle(
    tx: optax.GradientTransformation, table: ArrayLike, state: RowsState
) -> tuple[jax.Array, RowsState]:
    """Brings all rows up to date, for checkpoints, conversions, evaluation, or to continue densely.

    The table, and ``state.inner`` as the state of tx for it, are then those after the same number
    of dense steps, within rounding. The inverse is ``init(tx, table, inner)``.

    Args:
      tx: the transformation that ``init`` was called with.
      table: array of rows.
      state: the state after the last step.

    Returns:
      The table and the state, after the same number of steps.

    Raises:
      TypeError, ValueError: as in :func:`advance`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, rows
      >>> tx, table = rmsprop(0.1), jnp.ones((2, 1))
      >>> state = rows.init(tx, table)
      >>> for i in ([0], [1]):
      ...     table, state = rows.update(tx, jnp.array(i), jnp.ones((1, 1)), table, state)
      >>> _, settled = rows.settle(tx, table, state)
      >>> print(state.inner.nu.ravel(), settled.inner.nu.ravel())
      [0.1 0.1] [0.09 0.1 ]
    """
    return settled(*checked(tx, table, state, lazy=False), state)


def _places(indices: Any, table: jax.Array) -> jax.Array:
    """The indices as a vector; indices of no row are beyond the table."""
    if any(jax.typeof(table).sharding.spec):
        raise ValueError(
            f"table must be replicated on an Explicit mesh, got {jax.typeof(table)}: step its "
            "shards inside jax.shard_map"
        )
    return places(indices, len(table))


def _gradients(grads: Any, indices: Any, table: jax.Array) -> jax.Array:
    """The gradients of all indices in one dimension, in the precision of the table."""
    if leaf_type(grads).kind is None:
        raise TypeError(f"row_grads must be floating or complex, got {describe(grads)}")
    chex.assert_shape(
        grads,
        (*indices.shape, *table.shape[1:]),
        custom_message="row_grads must have a row for each index, like table[indices]",
    )
    with jax.numpy_dtype_promotion("standard"):  # of real and complex dtypes
        grads = widen(jnp.asarray(grads), jnp.finfo(table.dtype).dtype)
    return grads.reshape(-1, *table.shape[1:])

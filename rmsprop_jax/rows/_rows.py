"""Steps that cost the rows they touch."""

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
    """The state of a table before its first step.

    Args:
      tx: what ``rmsprop``, ``scale_by_rms`` or a dialect returns, with nothing around it.
      table: array of rows, of shape (n, ...); float32, float64 or complex.
      inner: a state of tx for the whole table to go on from, as of dense steps; None for that of
        ``tx.init``.
      lazy: whether rows take only the steps that touch them.

    Returns:
      A :class:`RowsState`, with arrays like the table, placed like it, and 4 bytes a row for its
      steps; without these if lazy.

    Raises:
      TypeError: if tx is anything else, or the table not such an array.
      ValueError: if tx cannot be followed on single rows. That is so if it is cautious, or has a
        storage. If not lazy, also with a schedule of the decay or the momentum, one of the learning
        rate behind momentum (``lr_in_momentum=False``), weight decay that is coupled, or decoupled
        with a schedule; if lazy, with bias correction.

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
    by_rows = jnp.any(table != table, axis=tuple(range(1, table.ndim)))  # placed like the rows
    return RowsState(inner, full_like(by_rows, inner.count, jnp.int32))


def update(
    tx: optax.GradientTransformation,
    indices: jax.Array | np.ndarray,
    row_grads: ArrayLike,
    table: ArrayLike,
    state: RowsState,
) -> tuple[jax.Array, RowsState]:
    """A step on the rows that a batch touches.

    Args:
      tx: the transformation that ``init`` was called with.
      indices: integers of any shape and dtype, the rows of the batch, repeated or not. n, the
        number of rows, stands for none. Inside jit every index below 0 or above n does, too.
      row_grads: floating or complex array of shape ``indices.shape + table.shape[1:]``, the
        gradient with respect to ``table[indices]``. Those of one row are added.
      table: array of rows.
      state: the state after the last step.

    Returns:
      The table and the state after the step. The learning rate, and whatever else is a schedule,
      are those of the step's number, which counts all calls.

    Raises:
      TypeError, ValueError: as :func:`init`; if indices are no integers, or one of them, where it
        is known, is below 0 or above n; if the state is of another table or transformation.
      AssertionError: by chex, if row_grads have another shape, or are complex where the table is
        not.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, rows
      >>> tx, table = rmsprop(0.1), jnp.ones((5, 2))
      >>> indices, row_grads = jnp.array([3, 0, 3]), jnp.ones((3, 2))
      >>> table, state = rows.update(tx, indices, row_grads, table, rows.init(tx, table))
      >>> print(table[:, 0], state.inner.nu[:, 0], state.steps)
      [0.6837722 1.        1.        0.6837722 1.       ] [0.1 0.  0.  0.4 0. ] [1 0 0 1 0]

    Sources: TensorFlow's ``SparseApplyRMSProp`` for the lazy meaning; the dense one by the closed
    form of the rule for gradients of 0, our own.
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
    """Brings some rows up to date, for a forward pass that is to see what the dense one would.

    With momentum b, and q = 1 - learning_rate weight_decay if that is decoupled, else 1, k steps
    without a gradient are

        x <- q^k x - b (q^(k-1) momentum + ... + momentum^k),  b <- momentum^k b,  s <- decay^k s

    Only there do rows move by themselves; without momentum and decoupled decay all rows are what
    they would be, and there is no need to call this.

    Args:
      tx: the transformation that ``init`` was called with.
      indices: those of the rows, as in :func:`update`.
      table: array of rows.
      state: the state after the last step.

    Returns:
      The table and the state, of the same number of steps.

    Raises:
      TypeError, ValueError: as :func:`update`; also if the state is lazy.

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
    """Brings all rows up to date: for checkpoints, conversions, evaluation, and to go on densely.

    The table, and ``state.inner`` as the state of tx for it, are then those of as many dense steps,
    within rounding. ``init(tx, table, inner)`` is the way back.

    Args:
      tx: the transformation that ``init`` was called with.
      table: array of rows.
      state: the state after the last step.

    Returns:
      The table and the state, of the same number of steps.

    Raises:
      TypeError, ValueError: as :func:`advance`.

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
    """The indices in one row, those of no row beyond the table."""
    if any(jax.typeof(table).sharding.spec):
        raise ValueError(
            f"table must be whole on an Explicit mesh, got {jax.typeof(table)}: step its parts "
            "inside jax.shard_map"
        )
    return places(indices, len(table))


def _gradients(grads: Any, indices: Any, table: jax.Array) -> jax.Array:
    """Those of each index, in one row, in the precision of the table."""
    if leaf_type(grads).kind is None:
        raise TypeError(f"row_grads must be floating or complex, got {describe(grads)}")
    chex.assert_shape(
        grads,
        (*indices.shape, *table.shape[1:]),
        custom_message="row_grads must have a row for each index, as the gradient by the rows",
    )
    with jax.numpy_dtype_promotion("standard"):  # of real and complex dtypes
        grads = widen(jnp.asarray(grads), jnp.finfo(table.dtype).dtype)
    return grads.reshape(-1, *table.shape[1:])

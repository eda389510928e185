"""The state of a table of rows, and the checks that table, state and transformation match."""

import contextlib
from typing import Any, NamedTuple

import jax
from jax import export
import jax.numpy as jnp
from jax.typing import ArrayLike
import optax

from rmsprop_jax import _checks
from rmsprop_jax._leaves import describe, leaf_type
from rmsprop_jax._rule import RMSPropState, Rule
from rmsprop_jax._storage import FLOAT32
from rmsprop_jax.rows._missed import refuse

_MOST = 2**30  # rows: int32 must hold their indices, and one more per index of a batch


class RowsState(NamedTuple):
    """The state of a table of rows.

    Attributes:
      inner: the state of the transformation for the whole table, in which rows may be behind.
      steps: how many steps each row has taken, int32, placed like the rows of the table. None if
        the state is lazy, in which case a row takes only the steps that touch it.
    """

    inner: RMSPropState
    steps: jax.Array | None


with contextlib.suppress(ValueError):  # registered already, if this module is reloaded
    export.register_namedtuple_serialization(RowsState, serialized_name="rmsprop_jax.RowsState")


def checked(
    tx: optax.GradientTransformation, table: ArrayLike, state: RowsState, lazy: bool | None = None
) -> tuple[Rule, jax.Array]:
    """The rule and the table, if transformation, table and state match."""
    if not isinstance(state, RowsState):
        raise TypeError(f"state must be a RowsState, got {type(state).__name__}")
    if lazy is False and state.steps is None:
        raise ValueError("state must not be lazy: its rows have no missed steps to make up")
    table = checked_table(table)
    rule = rule_of(tx, state.steps is None)
    check(rule, state.inner, table)
    if state.steps is not None and state.steps.shape != table.shape[:1]:
        raise ValueError(
            f"state.steps must have a number for each of {len(table)} rows, got "
            f"{describe(state.steps)}"
        )
    return rule, table


def checked_table(table: Any) -> jax.Array:
    kind = leaf_type(table)
    if not kind.shape or kind.kind is None or jnp.finfo(kind.dtype).bits < 32:
        raise TypeError(
            "table must be one array of rows, of float32, float64 or complex numbers, with a state "
            f"of its own, got {_briefly(table)}: call this once for each table, and keep 16-bit "
            "tables in float32"
        )
    if kind.shape[0] > _MOST:
        raise ValueError(f"table must have at most {_MOST} rows, got {describe(table)}")
    return jnp.asarray(table)


def _briefly(value: Any) -> str:
    return describe(value) if hasattr(value, "dtype") else type(value).__name__


def rule_of(tx: optax.GradientTransformation, lazy: bool) -> Rule:
    """The rule of a transformation, which must be applicable to single rows."""
    rule = getattr(tx, "part", None)
    if not isinstance(rule, Rule):
        raise TypeError(
            "tx must be what rmsprop, scale_by_rms or a dialect returns, with nothing around it, "
            f"got {tx!r}"
        )
    if rule.variant.storage != FLOAT32:
        raise ValueError(
            f"storage must be None for single rows, got {rule.variant.storage!r}: its scales and "
            "random bits are those of whole leaves"
        )
    if rule.variant.cautious:
        raise ValueError("cautious must be False: it depends on all rows, even without gradients")
    if not lazy:
        refuse(rule)
    elif rule.variant.bias_correction:
        raise ValueError("bias_correction must be False if lazy: it depends on steps of all rows")
    return rule


def check(rule: Rule, inner: RMSPropState, table: jax.Array) -> None:
    _checks.state(inner, RMSPropState, rule.in_use(), ())
    shape = getattr(inner.nu, "shape", None)
    if shape != table.shape:
        raise ValueError(
            f"state must be of this table, {describe(table)}, got nu of {describe(inner.nu)}"
        )

"""Steps of a table, each a program of its own: bit-identical eagerly and in a larger program."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rmsprop_jax._arrays import unfused
from rmsprop_jax._equations import Slots
from rmsprop_jax._rule import RMSPropState, Rule
from rmsprop_jax.rows._missed import caught_up
from rmsprop_jax.rows._state import RowsState
from rmsprop_jax.rows._touched import summed

_FIELDS = ("nu", "mu", "trace")
Result = tuple[jax.Array, RowsState]


def _program(f: Callable[..., Result]) -> Callable[..., Result]:
    """Jits a function of a rule, with its arrays as arguments: new values do not recompile it."""

    def unjitted(structure: Any, constants: tuple[Any, ...], arrays: Any, *args: Any) -> Result:
        leaves = [constants[i] if x is None else x for i, x in enumerate(arrays)]
        return f(structure.unflatten(leaves), *args)

    unjitted.__name__ = f.__name__  # the name that profiles show
    program = jax.jit(unjitted, static_argnums=(0, 1))

    @functools.wraps(f)
    def call(rule: Rule, *args: Any) -> Result:
        leaves, structure = jax.tree.flatten(rule)
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
        constants = (None if a else leaf for a, leaf in zip(is_array, leaves, strict=True))
        arrays = [leaf if a else None for a, leaf in zip(is_array, leaves, strict=True)]
        return program(structure, tuple(constants), arrays, *args)

    return call


@_program
def stepped(
    rule: Rule, at: jax.Array, grads: jax.Array, table: jax.Array, state: RowsState
) -> Result:
    """The table and state after a step on the rows ``at``, with one gradient for each."""
    at, grads = summed(at, grads, len(table))
    x, held = _up_to_date(rule, at, table, state)
    zero = held.count >> 31  # count is never negative
    updates, held = rule.update(grads, held, x)
    return _written(at, x + unfused(updates, zero), held, table, state, unique=True)


@_program
def advanced(rule: Rule, at: jax.Array, table: jax.Array, state: RowsState) -> Result:
    """The table and state, with the rows ``at`` brought up to date."""
    x, held = _up_to_date(rule, at, table, state)
    return _written(at, x, held, table, state, unique=False)


@_program
def settled(rule: Rule, table: jax.Array, state: RowsState) -> Result:
    """The table and state, with all rows brought up to date."""
    inner, steps = state
    assert steps is not None  # checked before
    slots = Slots(*(getattr(inner, name) for name in _FIELDS))
    table, slots = caught_up(table, slots, steps, inner.count, rule)
    inner = inner._replace(**slots._asdict())
    return table, RowsState(inner, jnp.full_like(steps, inner.count))


def _get(array: jax.Array | None, at: jax.Array) -> Any:
    return None if array is None else array.at[at].get(mode="clip")


def _up_to_date(
    rule: Rule, at: jax.Array, table: jax.Array, state: RowsState
) -> tuple[jax.Array, RMSPropState]:
    """The rows ``at``, up to date, and the state of the transformation for them."""
    inner, x = state.inner, _get(table, at)
    slots = Slots(*(_get(getattr(inner, name), at) for name in _FIELDS))
    if state.steps is not None:
        x, slots = caught_up(x, slots, _get(state.steps, at), inner.count, rule)
    return x, inner._replace(**slots._asdict())


def _written(
    at: jax.Array,
    x: jax.Array,
    held: RMSPropState,
    table: jax.Array,
    state: RowsState,
    *,
    unique: bool,
) -> Result:
    """The table and the state with the rows ``at`` replaced; indices beyond the end are dropped."""

    def put(array: jax.Array | None, rows: Any) -> Any:
        if array is None:
            return None
        place = array.at[at]
        return place.set(rows, mode="drop", indices_are_sorted=unique, unique_indices=unique)

    steps = None
    if state.steps is not None:
        # From what was read before, so that XLA updates it in place: no row is ahead of the count.
        steps = put(state.steps, jnp.maximum(_get(state.steps, at), held.count))
    fields = {name: put(getattr(state.inner, name), getattr(held, name)) for name in _FIELDS}
    return put(table, x), RowsState(held._replace(**fields), steps)

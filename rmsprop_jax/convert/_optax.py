"""The states of ``optax.rmsprop``."""

import functools
from typing import Any

import jax
from jax.tree_util import KeyPath, tree_map_with_path
import numpy as np
import optax

from rmsprop_jax._leaves import leaf_name
from rmsprop_jax.convert._arrays import place
from rmsprop_jax.convert._counts import COUNTERS, at_step, is_counter
from rmsprop_jax.convert._foreign import Entry, Foreign
from rmsprop_jax.convert._mapping import Leaf, LeafMapping, Name, by_path, take
from rmsprop_jax.convert._state import rules_at, to_ours, to_theirs

# Optax exports only four of these. Others, such as Adam's, have the same fields.
_STATES = {
    "ScaleByRmsState",
    "ScaleByRmsWithCountState",
    "ScaleByRStdDevState",
    "ScaleByRStdDevWithCountState",
    "ScaleByScheduleState",
    "TraceState",
}


def from_optax(
    opt_state: optax.OptState,
    params: optax.Params,
    tx: optax.GradientTransformation,
    *,
    steps: int | None = None,
) -> optax.OptState:
    """Converts the state of ``optax.rmsprop`` to that of a transformation of this library.

    s is ``nu``, minus ``mu`` squared if centered. b is ``trace`` with its sign changed, since
    Optax's points downhill. With bias correction both moments are divided by 1 - decay^steps.

    Args:
      opt_state: the state of ``optax.rmsprop`` in any of its forms, possibly inside Optax's
        wrappers, or of several for different parameters.
      params: tree of parameters, of which only the structure, shapes, dtypes and placement matter.
      tx: the transformation to continue with, usually ``rmsprop(...)``. It may be wrapped: every
        RMSPropState in its state is filled, the counts of wrappers and schedules continue, and
        everything else is as ``init`` makes it.
      steps: number of steps taken; None for that of opt_state, which has it if there is a schedule,
        bias correction, or ``optax.MultiSteps`` around it, and otherwise for 0.

    Returns:
      The state of tx.

    Raises:
      ValueError: if opt_state has another form than tx, or another tree than params, or if its
        counts differ and steps is not given.
      TypeError: if tx is not a transformation of this library.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import convert, rmsprop
      >>> params, tx, theirs = {"w": jnp.ones(2)}, rmsprop(0.1), optax.rmsprop(0.1)
      >>> _, opt_state = theirs.update({"w": jnp.array([10.0, 20.0])}, theirs.init(params))
      >>> print(convert.from_optax(opt_state, params, tx).nu["w"].round(4))
      [10. 40.]
    """
    found = [state for state in jax.tree.leaves(opt_state, is_leaf=_is_theirs) if _is_theirs(state)]
    slots: dict[str, dict[str, Any]] = {name: {} for name in Entry._fields}
    for state in found:
        for name in _fields(state):
            held = by_path(getattr(state, name))
            if twice := sorted(set(held) & set(slots[name])):
                raise ValueError(
                    f"opt_state must be of one optax.rmsprop, but has {name} of {twice} twice"
                )
            slots[name] |= held
    if not slots["nu"]:
        raise ValueError(f"opt_state must be of one optax.rmsprop, got {opt_state!r}")
    for name in ("mu", "trace"):
        if slots[name] and (differ := sorted(set(slots[name]) ^ set(slots["nu"]))):
            raise ValueError(f"opt_state has nu or {name} of {differ}, but not both")
    if steps is None:
        counts = _counts(opt_state)
        found_steps = sorted({count for _, count in counts}) or [0]
        if len(found_steps) > 1:
            raise ValueError(
                f"opt_state has the counts {found_steps}: pass steps. They are of {sorted(counts)}"
            )
        (steps,) = found_steps
    corrected = any({"nu", "count"} <= set(state._fields) for state in found)
    entries: dict[Name, Entry | None] = {}
    for path, nu in slots["nu"].items():
        mu, trace = (np.asarray(slots[n][path]) if slots[n] else None for n in ("mu", "trace"))
        entries[path] = Entry(np.asarray(nu), mu, None if trace is None else -trace)
    weight_sum = _weight_sum(tx, params, steps) if corrected else None
    foreign = Foreign(entries, steps, lr_in_momentum=True, weight_sum=weight_sum)
    return to_ours(foreign, params, _mapping(params), tx)


def to_optax(
    state: optax.OptState,
    params: optax.Params,
    tx: optax.GradientTransformation,
    like: optax.OptState,
) -> optax.OptState:
    """Converts a state to ``optax.rmsprop``: the inverse of :func:`from_optax`.

    Args:
      state: the state of tx.
      params: tree of parameters.
      tx: the transformation that the state belongs to.
      like: a state of the ``optax.rmsprop`` that is to continue, as ``init`` makes it.

    Returns:
      like, with the converted values.

    Raises:
      ValueError: if like has another form than tx, or another tree than params.
      TypeError: if tx is not a transformation of this library.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import convert, rmsprop
      >>> params, tx = {"w": jnp.ones(2)}, rmsprop(0.1)
      >>> _, state = tx.update({"w": jnp.array([10.0, 20.0])}, tx.init(params))
      >>> opt_state = convert.to_optax(state, params, tx, like=optax.rmsprop(0.1).init(params))
      >>> print(opt_state[0].nu["w"].round(4))
      [10. 40.]
    """
    foreign = to_theirs(state, params, _mapping(params), tx, lr_in_momentum=True)
    kept = {name for name, entry in foreign.entries.items() if entry is not None}
    has = {field: _has(foreign, field) for field in Entry._fields}

    def slot(field: str, path: KeyPath, old: Any) -> Any:
        where = leaf_name(path)
        if where not in foreign.entries:
            raise ValueError(f"like has {where!r}, but params does not")
        if where not in kept:
            return old
        value = getattr(foreign.entries[where], field)
        value = take(value, Leaf(where), np.shape(old), f"{field} of {where!r}")
        return place(old, -value if field == "trace" else value)

    def fill(old: Any) -> Any:
        if not _is_theirs(old):
            return old
        new: dict[str, Any] = {}
        for field in _fields(old):
            if not has[field]:
                raise ValueError(f"like has {field}, but tx does not")
            new[field] = tree_map_with_path(functools.partial(slot, field), getattr(old, field))
            filled[field] |= set(by_path(new[field]))
        if "count" in old._fields:
            new["count"] = place(old.count, np.asarray(foreign.steps))
            corrected.append("nu" in old._fields)
        return old._replace(**new)

    filled: dict[str, set[str]] = {field: set() for field in has}
    corrected: list[bool] = []
    made = jax.tree.map(fill, at_step(like, foreign.steps), is_leaf=_is_theirs)
    if left := sorted(field for field in has if has[field] and not filled[field]):
        raise ValueError(f"tx has {left}, but like does not")
    for field, paths in filled.items():
        if paths and (missing := sorted(kept - paths)):
            raise ValueError(f"like has no {field} of {missing}")
    if any(corrected) != (foreign.weight_sum is not None):
        raise ValueError(f"bias_correction={any(corrected)} in like, but not in tx")
    return made


def _mapping(params: optax.Params) -> LeafMapping:
    """Maps each leaf to itself."""
    return {path: path for path in by_path(params)}


def _counts(opt_state: optax.OptState) -> set[tuple[str, int]]:
    """The counts of updates in optax.rmsprop and around it, with the names of their states."""

    def is_either(node: Any) -> bool:
        return is_counter(node) or _is_theirs(node)

    counts: set[tuple[str, int]] = set()
    for node in jax.tree.leaves(opt_state, is_leaf=is_either):
        counter, inner = COUNTERS.get(type(node), ("count", None))
        within = _counts(getattr(node, inner)) if inner else set()
        counts |= within
        if isinstance(node, optax.MultiStepsState) and within:
            continue  # the wrapper may have been added later
        around = inner and any(map(_is_theirs, jax.tree.leaves(node, is_leaf=_is_theirs)))
        if (around or _is_theirs(node)) and counter in node._fields:
            counts.add((type(node).__name__, int(getattr(node, counter))))
    return counts


def _fields(state: Any) -> list[str]:
    """The slots that a state of Optax has."""
    return [field for field in Entry._fields if field in state._fields]


def _has(foreign: Foreign, field: str) -> bool:
    return any(entry and getattr(entry, field) is not None for entry in foreign.entries.values())


def _weight_sum(tx: optax.GradientTransformation, params: optax.Params, steps: int) -> float | None:
    """1 - decay^steps, by which Optax divides in every step, and we in the state."""
    found = [rule.hyper.decay for rule in rules_at(tx, tx.init(params), params)]
    decays = {None if callable(decay) else float(decay) for decay in found}
    if len(decays) != 1 or (decay := decays.pop()) is None:
        raise ValueError("tx must have one constant decay, as optax.rmsprop has")
    return 1 - decay**steps


def _is_theirs(value: Any) -> bool:
    """Whether this is one of the states in the chain of optax.rmsprop that holds something."""
    return type(value).__name__ in _STATES

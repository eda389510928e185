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

# Of these Optax exports but four. Adam's, say, has the same fields.
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
    """The state with which a transformation goes on where ``optax.rmsprop`` stopped.

    s is ``nu``, less ``mu`` squared if centered; b is ``trace`` with its sign changed, since
    Optax's points downhill. Under bias correction both are divided by 1 - decay^steps.

    Args:
      opt_state: of ``optax.rmsprop``, in any of its forms and of Optax's wrappers, or of several
        for different parameters.
      params: tree of parameters; only its structure, shapes, dtypes and placement count.
      tx: the transformation to go on with, ``rmsprop(...)`` as a rule. It may be wrapped: every
        RMSPropState in its state is filled, the counts of wrappers and schedules go on, and all
        else is as ``init`` makes it.
      steps: how many were taken; None for what opt_state says, which knows it if it has a schedule,
        bias correction, or ``optax.MultiSteps`` around it, or else 0.

    Returns:
      The state of tx.

    Raises:
      ValueError: if opt_state is of another form than tx, or of another tree than params, or its
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
                    f"opt_state must be of one optax.rmsprop, and has {name} of {twice} twice"
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
                f"opt_state has the counts {found_steps}: give steps. They are of {sorted(counts)}"
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
    """The state with which ``optax.rmsprop`` goes on: :func:`from_optax` undone.

    Args:
      state: of tx.
      params: tree of parameters.
      tx: the transformation whose state it is.
      like: a state of the ``optax.rmsprop`` that goes on, as ``init`` makes it.

    Returns:
      like, with other values.

    Raises:
      ValueError: if like is of another form than tx, or of another tree than params.
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
            raise ValueError(f"like has {where!r}, and params has not")
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
                raise ValueError(f"like has {field}, and tx has not")
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
        raise ValueError(f"tx has {left}, and like has not")
    for field, paths in filled.items():
        if paths and (missing := sorted(kept - paths)):
            raise ValueError(f"like has no {field} of {missing}")
    if any(corrected) != (foreign.weight_sum is not None):
        raise ValueError(f"bias_correction={any(corrected)} in like, but not so in tx")
    return made


def _mapping(params: optax.Params) -> LeafMapping:
    """Of each leaf to itself."""
    return {path: path for path in by_path(params)}


def _counts(opt_state: optax.OptState) -> set[tuple[str, int]]:
    """The counts of updates in optax.rmsprop and around it, with the states that they are of."""

    def is_either(node: Any) -> bool:
        return is_counter(node) or _is_theirs(node)

    counts: set[tuple[str, int]] = set()
    for node in jax.tree.leaves(opt_state, is_leaf=is_either):
        counter, inner = COUNTERS.get(type(node), ("count", None))
        within = _counts(getattr(node, inner)) if inner else set()
        counts |= within
        if isinstance(node, optax.MultiStepsState) and within:
            continue  # which may have been put around it later
        around = inner and any(map(_is_theirs, jax.tree.leaves(node, is_leaf=_is_theirs)))
        if (around or _is_theirs(node)) and counter in node._fields:
            counts.add((type(node).__name__, int(getattr(node, counter))))
    return counts


def _fields(state: Any) -> list[str]:
    """Which slots a state of Optax has."""
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

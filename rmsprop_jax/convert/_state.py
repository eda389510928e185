"""Conversion between the state of a transformation and that of any framework."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, tree_flatten_with_path, tree_map_with_path
import numpy as np
import optax

from rmsprop_jax._asking import ask, reports
from rmsprop_jax._checks import is_trained
from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._rule import RMSPropState, Rule, is_ours, rules_in, rules_of
from rmsprop_jax._schedule import real
from rmsprop_jax._storage import Slot, is_packed, slots_of, with_slots
from rmsprop_jax.convert._arrays import by_parts, narrow, place, square, wide
from rmsprop_jax.convert._counts import at_step
from rmsprop_jax.convert._foreign import Entry, Foreign, refuse_impossible
from rmsprop_jax.convert._groups import static_args
from rmsprop_jax.convert._mapping import (
    Leaf,
    LeafMapping,
    Name,
    assembled,
    by_path,
    names_of,
    refuse_unmapped,
    resolve,
    take,
)


def to_ours(
    foreign: Foreign, params: optax.Params, mapping: LeafMapping, tx: optax.GradientTransformation
) -> optax.OptState:
    """The state of tx after init, with the framework's state in every RMSPropState."""
    rules = rules_of(tx, params)
    if foreign.steps < 0:
        raise ValueError(f"the source has taken {foreign.steps} steps: it must be at least 0")
    start = at_step(tx.init(params), foreign.steps)
    kept = _kept(start, params)
    leaves = resolve(mapping, params, kept)
    refuse_unmapped(foreign.entries, leaves, kept)
    for name in names_of(leaves[path] for path in kept):
        refuse_impossible(name, foreign.entries[name])
    scale = _scale(foreign, rules, functools.partial(rules_at, tx, start, params))

    def fill(node: Any) -> Any:
        return _filled(node, foreign, leaves, scale, rules) if is_ours(node) else node

    return jax.tree.map(fill, start, is_leaf=is_ours)


def _filled(
    state: RMSPropState,
    foreign: Foreign,
    leaves: Mapping[str, Leaf],
    scale: float,
    rules: Sequence[Rule],
) -> RMSPropState:
    """One of the states in that of tx, filled with the framework's state."""
    new: dict[str, Any] = {}
    for field in Entry._fields:
        held = getattr(state, field)
        slots, structure = tree_flatten_with_path(slots_of(held), is_leaf=is_packed)
        for i, (path, old) in enumerate(slots):
            leaf = leaves[leaf_name(path)]
            if (entry := foreign.entries[leaf.name]) is None:
                continue
            _check_form(leaf.name, entry, state, rules, idle_momentum=foreign.idle_momentum)
            value = _slot(field, entry, leaf, old, foreign.weight_sum or 1.0)
            slots[i] = path, place(old, value * scale if field == "trace" else value)
        tree = jax.tree.unflatten(structure, [slot for _, slot in slots])
        new[field] = with_slots(held, tree)
    if state.weight_sum is not None:
        new["weight_sum"] = place(state.weight_sum, np.asarray(foreign.weight_sum))
    return state._replace(count=place(state.count, np.asarray(foreign.steps)), **new)


def _check_form(
    name: Name, entry: Entry, state: RMSPropState, rules: Sequence[Rule], *, idle_momentum: bool
) -> None:
    """Refuses an array that has mu or trace if the state of tx does not, or vice versa."""
    for field, kind in (("mu", "centered"), ("trace", "momentum")):
        ours, theirs = getattr(state, field), getattr(entry, field)
        idle = field == "trace" and ours is None and idle_momentum
        if (ours is None) != (theirs is None) and not idle:
            has, lacks = ("the source", "tx") if ours is None else ("tx", "the source")
            raise ValueError(
                f"{has} has {kind} for {name!r}, but {lacks} does not{static_args(rules)}"
            )


def _kept(state: optax.OptState, params: optax.Params) -> set[str]:
    """The paths of the parameters that have a state: not integers, nor frozen ones."""
    kept = {path for one in _states(state) for path in by_path(slots_of(one.nu))}
    if other := sorted(kept - set(by_path(params))):
        raise ValueError(f"tx keeps its state in another form than params: at {other}")
    if not kept:
        raise ValueError("tx keeps no state for any parameter")
    return kept


def _states(state: optax.OptState) -> list[RMSPropState]:
    return [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]


def to_theirs(
    state: optax.OptState,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    *,
    lr_in_momentum: bool,
) -> Foreign:
    """The state of tx in the form of a framework.

    Its entries are whole arrays, or None for arrays mapped to leaves for which tx keeps no state.
    """
    rules = rules_of(tx, params)
    kept = _kept(ask(tx.init, params)[1], params)
    mapped = resolve(mapping, params, kept)
    leaves = {path: leaf for path, leaf in mapped.items() if path in kept}
    wanted = [rule.in_use() for rule in rules]
    ours = _states(state)
    if not ours:
        raise ValueError(f"state has no RMSPropState in it, got {type(state).__name__}")
    in_use = [{field: getattr(one, field) is not None for field in wanted[0]} for one in ours]
    if not all(a in wanted for a in in_use) or not all(a in in_use for a in wanted):
        raise ValueError("state is not of tx: it has other slots")
    count = int(ours[0].count)
    weight_sum = None if ours[0].weight_sum is None else float(ours[0].weight_sum)
    foreign = Foreign({}, count, lr_in_momentum, weight_sum)
    scale = 1 / _scale(foreign, rules, functools.partial(rules_at, tx, state, params))
    w = weight_sum or 1.0

    slots: dict[str, dict[str, np.ndarray]] = {field: {} for field in Entry._fields}
    for one in ours:
        s, m, b = (by_path(slots_of(getattr(one, field))) for field in slots)
        for path, held in s.items():
            if path in slots["nu"]:
                raise ValueError(f"state has {path!r} twice")
            v = wide(held)
            if path in m:
                v = v + square(wide(m[path]), complex_parts=np.iscomplexobj(v))
                slots["mu"][path] = narrow(wide(m[path]) * w, m[path])
            slots["nu"][path] = narrow(v * w, held)
            if path in b:
                slots["trace"][path] = narrow(wide(b[path]) * scale, b[path])
    if missing := sorted(set(leaves) - set(slots["nu"])):
        raise ValueError(f"state has nothing for {missing}")
    if unexpected := sorted(set(slots["nu"]) - set(leaves)):
        raise ValueError(f"state has {unexpected}, but params does not")
    whole = {
        field: assembled(values, {path: leaves[path] for path in values})
        for field, values in slots.items()
    }
    entries: dict[Name, Entry | None] = dict.fromkeys(names_of(mapped.values()))
    entries |= {
        name: Entry(nu, whole["mu"].get(name), whole["trace"].get(name))
        for name, nu in whole["nu"].items()
    }
    return foreign._replace(entries=entries)


def _slot(field: str, entry: Entry, leaf: Leaf, old: Slot, w: float) -> np.ndarray:
    """A slot in our layout, in double precision."""

    def taken(name: str) -> np.ndarray:
        what = f"{name} of {leaf.name!r}"
        return wide(take(np.asarray(getattr(entry, name)), leaf, old.shape, what))

    if field != "nu":
        return taken(field) / (w if field == "mu" else 1.0)
    v = taken("nu") / w
    if not np.iscomplexobj(old):
        v = v.real
    if entry.mu is not None:
        v = v - square(taken("mu") / w, complex_parts=np.iscomplexobj(v))
    zero = np.zeros(())
    return by_parts(lambda part: np.maximum(part, zero), v)


def _scale(
    foreign: Foreign, rules: Sequence[Rule], with_numbers: Callable[[], Sequence[Rule]]
) -> float:
    """The factor that converts the buffers of the framework to those of tx.

    If only one of them has the learning rate in the buffer, the factor is the learning rate of the
    step after foreign.steps others, or its inverse: that step is then the same.
    """
    for rule in rules:
        if rule.variant.bias_correction != (foreign.weight_sum is not None):
            raise ValueError(
                f"bias_correction={rule.variant.bias_correction} in tx, but not in the source"
            )
    with_momentum = [rule for rule in rules if rule.hyper.momentum is not None]
    inside = {rule.variant.lr_in_momentum for rule in with_momentum}
    if inside <= {foreign.lr_in_momentum}:
        return 1.0
    rates = {
        _rate(rule, foreign.steps) for rule in with_numbers() if rule.hyper.momentum is not None
    }
    if len(inside) > 1 or len(rates) > 1:
        raise ValueError("tx has several learning rates: convert each of its parts separately")
    (rate,) = rates
    if rate == 0:
        raise ValueError(
            f"the learning rate after {foreign.steps} steps is 0: no buffer can be scaled by it"
        )
    return 1 / rate if foreign.lr_in_momentum else rate


def rules_at(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> list[Rule]:
    """The rules of tx, with the hyperparameters of the next step where the state holds them."""
    rules = rules_of(tx, params)
    if not any(isinstance(h, jax.ShapeDtypeStruct) for rule in rules for h in rule.hyper):
        return rules

    def zero(path: KeyPath, x: Any) -> jax.Array | None:
        return jnp.zeros(np.shape(x), jnp.result_type(x)) if is_trained(path, x) else None

    zeros = tree_map_with_path(zero, params)
    with reports() as found:
        tx.update(zeros, state, zeros)
    if not (rules := rules_in([part for part, _ in found])):
        raise ValueError("tx keeps hyperparameters in its state, but its next step ignores them")
    return rules


def _rate(rule: Rule, count: int) -> float:
    rate = rule.hyper.learning_rate
    with jax.numpy_dtype_promotion("standard"):  # as in an update
        return float(real(rate(jnp.asarray(count, jnp.int32)) if callable(rate) else rate))

"""The state of a transformation from and to what every framework remembers of an array."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, tree_map_with_path
import numpy as np
import optax

from rmsprop_jax._asking import reports
from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._rule import RMSPropState, Rule, is_ours, rules_in, rules_of
from rmsprop_jax._schedule import real
from rmsprop_jax._storage import Slot, is_packed, slots_of, with_slots
from rmsprop_jax.convert._groups import static_args
from rmsprop_jax.convert._mapping import (
    Leaf,
    LeafMapping,
    Name,
    assembled,
    by_path,
    refuse_unmapped,
    resolve,
    take,
    with_state,
)


class Entry(NamedTuple):
    """What a framework remembers of one array; None for what it does not.

    Attributes:
      nu: second moment of the gradient, never its variance.
      mu: mean of the gradient.
      trace: momentum buffer; the parameters move against it.
    """

    nu: np.ndarray
    mu: np.ndarray | None = None
    trace: np.ndarray | None = None


class Foreign(NamedTuple):
    """All that a framework remembers.

    Attributes:
      entries: by name; None for an array that has not taken a step.
      steps: how many were taken.
      lr_in_momentum: whether the buffers contain the learning rate.
      weight_sum: the number by which nu and mu are to be divided, if they are biased.
      idle_momentum: whether there are buffers even where there is no momentum.
    """

    entries: Mapping[Name, Entry | None]
    steps: int
    lr_in_momentum: bool
    weight_sum: float | None = None
    idle_momentum: bool = False


def to_ours(
    foreign: Foreign, params: optax.Params, mapping: LeafMapping, tx: optax.GradientTransformation
) -> optax.OptState:
    """The state of tx after init, with what the framework remembers in every RMSPropState."""
    rules = rules_of(tx, params)
    start = _at_step(tx.init(params), foreign.steps)
    leaves = resolve(*with_state(mapping, params))
    refuse_unmapped(foreign.entries, leaves)
    scale = _scale(foreign, rules, functools.partial(rules_at, tx, start, params))
    filled: set[str] = set()

    def fill(state: optax.OptState) -> optax.OptState:
        if not isinstance(state, RMSPropState):
            return state

        def slot(field: str, path: KeyPath, old: Slot) -> Slot:
            where = leaf_name(path)
            if where not in leaves:
                raise ValueError(f"tx keeps its state in another form than params: at {where!r}")
            filled.add(where)
            name = leaves[where].name
            entry = foreign.entries[name]
            if entry is None:
                return old
            for needed in ("mu", "trace"):
                ours, theirs = getattr(state, needed), getattr(entry, needed)
                idle = needed == "trace" and ours is None and foreign.idle_momentum
                if (ours is None) != (theirs is None) and not idle:
                    kind = {"mu": "centered", "trace": "momentum"}[needed]
                    has, lacks = ("the source", "tx") if ours is None else ("tx", "the source")
                    raise ValueError(
                        f"{has} has {kind} for {name!r}, which {lacks} has not{static_args(rules)}"
                    )
            value = _slot(field, entry, leaves[where], old, foreign.weight_sum or 1.0)
            return place(old, value * scale if field == "trace" else value)

        trees = {}
        for field in ("nu", "mu", "trace"):
            held = getattr(state, field)
            fill_slot = functools.partial(slot, field)
            trees[field] = with_slots(
                held, tree_map_with_path(fill_slot, slots_of(held), is_leaf=is_packed)
            )
        weight_sum = state.weight_sum
        if weight_sum is not None:
            weight_sum = place(weight_sum, np.asarray(foreign.weight_sum))
        return RMSPropState(
            count=place(state.count, np.asarray(foreign.steps)), weight_sum=weight_sum, **trees
        )

    state = jax.tree.map(fill, start, is_leaf=is_ours)
    if left := sorted(set(leaves) - filled):
        raise ValueError(f"tx keeps no state for {left}")
    return state


def to_theirs(
    state: optax.OptState,
    params: optax.Params,
    mapping: LeafMapping,
    tx: optax.GradientTransformation,
    *,
    lr_in_momentum: bool,
) -> Foreign:
    """What a framework would remember, of a state of tx. Its entries are whole arrays."""
    leaves = resolve(*with_state(mapping, params))
    rules = rules_of(tx, params)
    wanted = [rule.in_use() for rule in rules]
    ours = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(leaf)]
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

    slots: dict[str, dict[str, np.ndarray]] = {"nu": {}, "mu": {}, "trace": {}}
    for one in ours:
        s, m, b = (by_path(slots_of(getattr(one, field))) for field in slots)
        for path, held in s.items():
            if path in slots["nu"]:
                raise ValueError(f"state has {path!r} twice")
            v = _wide(held)
            if path in m:
                v = v + _square(_wide(m[path]), complex_parts=np.iscomplexobj(v))
                slots["mu"][path] = _narrow(_wide(m[path]) * w, m[path])
            slots["nu"][path] = _narrow(v * w, held)
            if path in b:
                slots["trace"][path] = _narrow(_wide(b[path]) * scale, b[path])
    if missing := sorted(set(leaves) - set(slots["nu"])):
        raise ValueError(f"state has nothing for {missing}")
    if unexpected := sorted(set(slots["nu"]) - set(leaves)):
        raise ValueError(f"state keeps {unexpected}, which params has not")
    whole = {
        field: assembled(values, {path: leaves[path] for path in values})
        for field, values in slots.items()
    }
    entries = {
        name: Entry(nu, whole["mu"].get(name), whole["trace"].get(name))
        for name, nu in whole["nu"].items()
    }
    return foreign._replace(entries=entries)


def _slot(field: str, entry: Entry, leaf: Leaf, old: Slot, w: float) -> np.ndarray:
    """A slot in our layout, in double precision."""

    def taken(name: str) -> np.ndarray:
        what = f"{name} of {leaf.name!r}"
        return _wide(take(np.asarray(getattr(entry, name)), leaf, old.shape, what))

    if field != "nu":
        return taken(field) / (w if field == "mu" else 1.0)
    v = taken("nu") / w
    if not np.iscomplexobj(old):
        v = v.real
    if entry.mu is None:
        return v
    s = v - _square(taken("mu") / w, complex_parts=np.iscomplexobj(v))
    zero = np.zeros(())
    return _by_parts(lambda part: np.maximum(part, zero), s)


def _scale(
    foreign: Foreign, rules: Sequence[Rule], with_numbers: Callable[[], Sequence[Rule]]
) -> float:
    """The number that turns the buffers of the framework into those of tx.

    It is the learning rate of the step after count others, where one has it in the buffer and the
    other after it: that step is then the same.
    """
    for rule in rules:
        if rule.variant.bias_correction != (foreign.weight_sum is not None):
            raise ValueError(
                f"bias_correction={rule.variant.bias_correction} in tx, but not so in the source"
            )
    with_momentum = [rule for rule in rules if rule.hyper.momentum is not None]
    inside = {rule.variant.lr_in_momentum for rule in with_momentum}
    if inside <= {foreign.lr_in_momentum}:
        return 1.0
    rates = {
        _rate(rule, foreign.steps) for rule in with_numbers() if rule.hyper.momentum is not None
    }
    if len(inside) > 1 or len(rates) > 1:
        raise ValueError("tx has several learning rates: convert each of its parts by itself")
    (rate,) = rates
    if rate == 0:
        raise ValueError(f"the learning rate after {foreign.steps} steps is 0: no buffer has it")
    return 1 / rate if foreign.lr_in_momentum else rate


def _at_step(state: optax.OptState, count: int) -> optax.OptState:
    """A state in which the schedules of ``optax.inject_hyperparams`` have taken so many steps."""

    def is_injected(node: Any) -> bool:
        return isinstance(node, optax.InjectStatefulHyperparamsState)

    def fill(node: Any) -> Any:
        if not is_injected(node):
            return node
        steps, schedules = place(node.count, np.asarray(count)), node.hyperparams_states
        if optax.tree.get_all_with_path(schedules, "count"):
            schedules = optax.tree.set(schedules, count=steps)
        inner = _at_step(node.inner_state, count)
        return node._replace(count=steps, hyperparams_states=schedules, inner_state=inner)

    return jax.tree.map(fill, state, is_leaf=is_injected)


def rules_at(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> list[Rule]:
    """The rules of tx, with the numbers of the step after a state, if a state has some of them."""
    rules = rules_of(tx, params)
    if not any(isinstance(h, jax.ShapeDtypeStruct) for rule in rules for h in rule.hyper):
        return rules
    _, params = with_state({}, params)
    zeros = jax.tree.map(lambda x: jnp.zeros(np.shape(x), jnp.result_type(x)), params)
    with reports() as found:
        tx.update(zeros, state, zeros)
    if not (rules := rules_in([part for part, _ in found])):
        raise ValueError("tx has its numbers in a state, and does not use them in its next step")
    return rules


def _rate(rule: Rule, count: int) -> float:
    rate = rule.hyper.learning_rate
    with jax.numpy_dtype_promotion("standard"):  # as in an update
        return float(real(rate(jnp.asarray(count, jnp.int32)) if callable(rate) else rate))


def place(old: Any, value: Any) -> Any:
    """A copy of value as an array or slot like old, where old is, and as free to move as old is."""
    if is_packed(old):
        return jax.tree.map(place, old, old.encode(value))
    value = np.asarray(value).astype(old.dtype)
    if not isinstance(old, jax.Array):
        return value
    return jax.device_put(value, old.sharding) if old.committed else jnp.asarray(value)


def _wide(value: Any) -> np.ndarray:
    value = np.asarray(value.decode() if is_packed(value) else value)
    return value.astype(np.result_type(value.dtype, np.float64))


def _narrow(value: np.ndarray, like: Slot) -> np.ndarray:
    return value.astype(np.promote_types(like.dtype, np.float32))


def _square(m: np.ndarray, *, complex_parts: bool) -> np.ndarray:
    return _by_parts(np.square, m) if complex_parts else np.square(m.real) + np.square(m.imag)


def _by_parts(f: Callable[[np.ndarray], np.ndarray], z: np.ndarray) -> np.ndarray:
    return f(z.real) + 1j * f(z.imag) if np.iscomplexobj(z) else f(z)

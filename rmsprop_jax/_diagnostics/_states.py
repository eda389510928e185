"""Which rule each RMSPropState in a state follows, with the hyperparameters that hold now."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.tree_util import KeyPath, tree_leaves_with_path
import optax

from rmsprop_jax import _checks
from rmsprop_jax._asking import Part, Report, ask, ask_without_params, report, reports
from rmsprop_jax._equations import Hyper
from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._rule import RMSPropState, Rule, is_ours, some_rules
from rmsprop_jax._schedule import real


class Followed(NamedTuple):
    """A state, the rule that it follows, and the hyperparameters of its next step."""

    state: RMSPropState
    rule: Rule
    hyper: Hyper


def followed(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params | None
) -> tuple[list[Followed], list[Part]]:
    """Every RMSPropState in a state of tx, in the order of its leaves; and all parts of tx.

    Of params only the structure, shapes and dtypes count. Without them, stand-ins do as far as the
    wrappers in tx allow.
    """
    if not callable(getattr(tx, "init", None)):
        some_rules(tx, [])

    def init(params: optax.Params) -> optax.OptState:
        with reports() as found:
            made = tx.init(params)
        for one in (*_links(found, made), *(part for part, _ in found)):
            report(one)
        return made

    told: Any = ask_without_params(init) if params is None else ask(init, params)[0]
    if told is None:
        raise ValueError(
            "params must be given: a wrapper in tx does not work without its tree of parameters"
        )
    parts = [part for part in told if not isinstance(part, _Link)]
    links = [link for link in told if isinstance(link, _Link)]
    some_rules(tx, parts)
    ours = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if len(ours) != len(links):
        raise ValueError(
            f"state must be one of tx, which has {len(links)} RMSPropState in it, got {len(ours)}"
        )
    values = dict(tree_leaves_with_path(state))
    return [link.followed(one, values) for link, one in zip(links, ours, strict=True)], parts


class _Link:
    """The rule of a state, and where its hyperparameters are; no pytree, so nobody changes it."""

    def __init__(self, rule: Rule, places: dict[int, KeyPath]) -> None:
        self.rule = rule
        self.places = places  # of those that a wrapper has in its state, by their ids

    def followed(self, state: RMSPropState, values: dict[KeyPath, Any]) -> Followed:
        rule = self.rule
        _checks.state(state, RMSPropState, rule.in_use(), rule.variant.storage.joins)
        known: Hyper = jax.tree.map(lambda leaf: self._value(leaf, values), rule.hyper)
        with jax.numpy_dtype_promotion("standard"):  # whatever is mixed in a schedule
            at = {
                name: real(_checks.number(name, h(state.count), schedule=False))
                if callable(h)
                else real(h)
                for name, h in known._asdict().items()
            }
        return Followed(state, rule, Hyper(**at))

    def _value(self, leaf: Any, values: dict[KeyPath, Any]) -> Any:
        """A leaf of the hyperparameters, as it is now."""
        if id(leaf) in self.places:
            place = self.places[id(leaf)]
            if place not in values:
                raise ValueError(
                    f"state must be one of tx, which has a number at {leaf_name(place)!r} in it"
                )
            return values[place]
        if isinstance(leaf, jax.core.Tracer):
            try:
                lax.add(leaf, leaf)
            except jax.errors.UnexpectedTracerError:
                raise ValueError(
                    "tx must pass hyperparameters on as they are in its state, got some that a "
                    "function inside optax.inject_hyperparams computes: compute them outside, or "
                    "in a schedule"
                ) from None
        return leaf


def _links(found: Sequence[Report], made: optax.OptState) -> Iterator[_Link]:
    """A link for each RMSPropState in the state that a transformation made."""
    rules = {id(state): part for part, state in found if isinstance(part, Rule)}
    places = {
        id(leaf): path
        for path, leaf in tree_leaves_with_path(made)
        if isinstance(leaf, jax.core.Tracer)
    }
    for node in jax.tree.leaves(made, is_leaf=is_ours):
        if is_ours(node):
            yield _Link(rules[id(node)], places)

"""The number of updates, in those states around a rule that count them."""

from typing import Any

import jax
import numpy as np
import optax

from rmsprop_jax.convert._arrays import place
from rmsprop_jax.low_memory._master_weights import MasterWeightsState

# The states that count updates: the field of the count, and that of the inner state.
COUNTERS: dict[type, tuple[str, str | None]] = {
    optax.InjectStatefulHyperparamsState: ("count", "inner_state"),
    optax.MultiStepsState: ("gradient_step", "inner_opt_state"),
    optax.ScaleByScheduleState: ("count", None),
    MasterWeightsState: ("count", "inner_state"),
}


def at_step(state: optax.OptState, count: int) -> optax.OptState:
    """A state in which all counters of updates around our own states are set to count."""

    def fill(node: Any) -> Any:
        if not is_counter(node):
            return node
        counter, inner = COUNTERS[type(node)]
        steps = place(getattr(node, counter), np.asarray(count))
        new = {counter: steps} | ({inner: at_step(getattr(node, inner), count)} if inner else {})
        if optax.tree.get_all_with_path(getattr(node, "hyperparams_states", ()), "count"):
            new["hyperparams_states"] = optax.tree.set(node.hyperparams_states, count=steps)
        return node._replace(**new)

    return jax.tree.map(fill, state, is_leaf=is_counter)


def is_counter(node: Any) -> bool:
    """Whether this is a state around a rule that counts updates."""
    return type(node) in COUNTERS

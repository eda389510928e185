"""The rule lifted from one array to a tree of parameters: what it is made of, init and update."""

from collections.abc import Sequence
import contextlib
import functools
from typing import Any, NamedTuple

import jax
from jax import export
import jax.numpy as jnp
from jax.tree_util import KeyPath
import numpy as np
import optax

from rmsprop_jax import _checks, _equations, _gradients
from rmsprop_jax._asking import Part, ask
from rmsprop_jax._leaves import leaf_name, leaf_numbers
from rmsprop_jax._schedule import real
from rmsprop_jax._storage import Slot, beside, is_packed, slots_of, slots_to_step, with_slots
from rmsprop_jax._types import PyTree, Scalar


class RMSPropState(NamedTuple):
    """The optimizer state of RMSProp; a field that is not in use is None.

    Attributes:
      count: number of steps taken, an int32 scalar that stops at its largest value.
      nu: second moment of the gradient, or its variance if centered. A tree with the structure and
        placement of the parameters. Its arrays are float32, or float64 for float64 parameters,
        unless a storage holds them otherwise. They are real, unless complex numbers are split.
      mu: mean of the gradient, if centered. Like nu, but complex where a parameter is complex.
      trace: momentum buffer, if there is momentum. Like mu; the parameters move against it.
      weight_sum: sum of the weights of the gradients in nu, if the bias is corrected. A scalar
        of the widest dtype in nu.
    """

    count: jax.Array  # type: ignore[assignment] # hides tuple's method, as Optax's states do
    nu: PyTree
    mu: PyTree
    trace: PyTree
    weight_sum: jax.Array | None


def is_ours(value: Any) -> bool:
    """Whether a node of another transformation's state is an RMSPropState."""
    return isinstance(value, RMSPropState)


with contextlib.suppress(ValueError):  # registered already, if this module is reloaded
    export.register_namedtuple_serialization(
        RMSPropState, serialized_name="rmsprop_jax.RMSPropState"
    )


class Rule(NamedTuple):
    """Which RMSProp, with which numbers. Its methods are the two functions of a transformation."""

    hyper: _equations.Hyper  # floats, arrays, schedules, or None for an absent term
    variant: _equations.Variant
    initial_scale: Scalar

    def init(self, params: optax.Params) -> RMSPropState:
        storage = self.variant.storage

        def held(field: str, value: Scalar) -> Any:
            is_real = field == "nu" and not self.variant.split_complex

            def slot(path: KeyPath, param: Any) -> Slot | None:
                if not _checks.is_trained(path, param):
                    return None
                name = leaf_name(path)
                return storage.init(param, value, field=field, path=name, real=is_real)

            slots = jax.tree_util.tree_map_with_path(slot, params)
            return storage.join(slots, field=field)

        in_use = self.in_use()
        nu = held("nu", real(self.initial_scale))
        dtypes = map(storage.dtype, jax.tree.leaves(slots_of(nu), is_leaf=is_packed))
        widest = np.result_type(np.float32, *dtypes)  # jnp's promotion may be strict
        return RMSPropState(
            count=beside(jnp.zeros([], jnp.int32), params),
            nu=nu,
            mu=held("mu", 0.0) if in_use["mu"] else None,
            trace=held("trace", 0.0) if in_use["trace"] else None,
            weight_sum=beside(jnp.zeros([], widest), params) if in_use["weight_sum"] else None,
        )

    def update(
        self,
        updates: optax.Updates,
        state: RMSPropState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RMSPropState]:
        del extra_args
        in_use, variant = self.in_use(), self.variant
        storage = variant.storage
        _checks.state(state, RMSPropState, in_use, storage.joins)
        if self.hyper.weight_decay is not None and params is None:
            raise ValueError("weight_decay needs the parameters: call update(grads, state, params)")

        grads = _gradients.gradients(updates)
        nothing = [None] * len(grads.leaves)

        def held_of(field: str) -> list[Any]:
            slots = slots_to_step(getattr(state, field))
            is_real = field == "nu" and not variant.split_complex
            return _gradients.counterparts(grads, field, slots, real=is_real, dtypes=storage.dtypes)

        old = [held_of(field) if in_use[field] else nothing for field in ("nu", "mu", "trace")]
        if self.hyper.weight_decay is not None:
            xs = _gradients.counterparts(grads, "params", params)
        else:
            _gradients.same_kinds(grads, params)
            xs = nothing
        # A schedule may mix dtypes freely, whatever promotion the user's own code requires.
        with jax.numpy_dtype_promotion("standard"):
            hyper = _equations.Hyper(
                *(_at(state.count, name, h) for name, h in self.hyper._asdict().items())
            )
            weight_sum = state.weight_sum
            if weight_sum is not None:
                hyper, weight_sum = _equations.correct_bias(hyper, weight_sum, state.count)
            scalars_in = functools.cache(lambda real: _equations.scalars(hyper, variant, real))
            numbers = leaf_numbers(grads.structure) if storage.draws else nothing
            steps, new = [], []
            for number, g, x, *slots in zip(numbers, grads.leaves, xs, *old, strict=True):
                u, held = None, _equations.Slots(*slots)
                turn = None if number is None else _equations.Turn(state.count, number)
                if g is not None and held.nu is not None:
                    scalars = scalars_in(storage.dtype(held.nu))
                    u, held = _equations.step(g, x, held, scalars, turn, variant)
                steps.append(u)
                new.append(held)

        def field_of(name: str) -> Any:
            tree = grads.structure.unflatten([getattr(held, name) for held in new])
            return with_slots(getattr(state, name), tree)

        return grads.structure.unflatten(steps), RMSPropState(
            count=_increment(state.count),
            nu=field_of("nu"),
            mu=field_of("mu") if in_use["mu"] else None,
            trace=field_of("trace") if in_use["trace"] else None,
            weight_sum=weight_sum,
        )

    def in_use(self) -> dict[str, bool]:
        """Which of the fields that a step changes are in use, that is, not None."""
        return {
            "nu": True,
            "mu": self.variant.centered,
            "trace": self.hyper.momentum is not None,
            "weight_sum": self.variant.bias_correction,
        }


_increment = jax.jit(optax.safe_increment)


def _at(count: jax.Array, name: str, value: Any) -> Any:
    """A hyperparameter in the step that follows count others: a number or an array."""
    if callable(value):
        value = _checks.number(name, value(count), schedule=False)
    if name == "decay" and isinstance(value, float):
        return _equations.Decay(value, 1 - value)
    return real(value)


def rules_in(parts: Sequence[Part]) -> list[Rule]:
    """The rules among the parts of a transformation."""
    return [part for part in parts if isinstance(part, Rule)]


def rules_of(tx: optax.GradientTransformation, params: optax.Params) -> list[Rule]:
    """The rules that tx follows for these parameters; raises TypeError if there are none."""
    init = getattr(tx, "init", None)
    return some_rules(tx, ask(init, params)[0] if callable(init) else [])


def some_rules(tx: optax.GradientTransformation, parts: Sequence[Part]) -> list[Rule]:
    """The rules among the parts of tx; raises TypeError if there are none."""
    rules = rules_in(parts)
    if not rules:
        raise TypeError(f"tx must be an RMSProp of rmsprop_jax or contain one, got {tx!r}")
    return rules

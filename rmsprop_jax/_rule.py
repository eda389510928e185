"""A rule lifted from one array to a tree of parameters: what the rule is, init and update."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import inspect
from typing import Any, NamedTuple
import zlib

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, _equations
from rmsprop_jax._storage import Slot, is_packed, join, split

Scalar = float | jax.Array
ScalarOrSchedule = Scalar | Callable[[jax.Array], Any]


class RMSPropState(NamedTuple):
    """What RMSProp remembers from step to step; what is not in use is None as a whole.

    Attributes:
      count: steps taken, an int32 scalar that stops at its largest value.
      nu: second moment of the gradient, or its variance if centered. A tree like the
        parameters, placed like them; float32, or float64 for float64 parameters, unless a storage
        holds it otherwise; real, unless the parts of complex numbers are split.
      mu: mean of the gradient, if centered. Like nu, but complex where a parameter is complex.
      trace: momentum buffer, if there is momentum. Like mu; the parameters move against it.
      weight_sum: sum of the weights of the gradients in nu, if the bias is corrected. A scalar
        of the widest dtype in nu.
    """

    count: jax.Array  # type: ignore[assignment] # hides tuple's method, as Optax's states do
    nu: Any
    mu: Any
    trace: Any
    weight_sum: jax.Array | None


def is_ours(value: Any) -> bool:
    """Whether a node of another transformation's state is one of these."""
    return isinstance(value, RMSPropState)


with contextlib.suppress(ValueError):  # registered already, if this module is reloaded
    export.register_namedtuple_serialization(
        RMSPropState, serialized_name="rmsprop_jax.RMSPropState"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """Which RMSProp, with which numbers. Its methods are the two functions of a transformation."""

    hyper: _equations.Hyper  # floats, arrays, schedules, or None for a term that is not there
    variant: _equations.Variant
    initial_scale: Scalar
    centered: bool
    bias_correction: bool

    def init(self, params: optax.Params) -> RMSPropState:
        for path, param in jax.tree_util.tree_leaves_with_path(params):
            _checks.parameter(path, param)
        storage = self.variant.storage

        def held(field: str, value: Scalar) -> Any:
            real = field == "nu" and not self.variant.split_complex

            def slot(path: Any, param: jax.Array) -> Slot:
                name = _checks.leaf_name(path)
                return storage.init(param, value, field=field, path=name, real=real)

            slots = jax.tree_util.tree_map_with_path(slot, params)
            return storage.join(slots, field=field)

        in_use = self._slots_in_use()
        nu = held("nu", self.initial_scale)
        dtypes = map(storage.dtype, jax.tree.leaves(split(nu), is_leaf=is_packed))
        widest = np.result_type(np.float32, *dtypes)  # of float32 and float64: jnp's may be strict
        return RMSPropState(
            count=jnp.zeros([], jnp.int32),
            nu=nu,
            mu=held("mu", 0.0) if in_use["mu"] else None,
            trace=held("trace", 0.0) if in_use["trace"] else None,
            weight_sum=jnp.zeros([], widest) if in_use["weight_sum"] else None,
        )

    def update(
        self,
        updates: optax.Updates,
        state: RMSPropState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RMSPropState]:
        del extra_args
        in_use = self._slots_in_use()
        storage = self.variant.storage
        _checks.state(state, RMSPropState, in_use, storage.joins)
        if self.hyper.weight_decay is None:
            params = None
        elif params is None:
            raise ValueError("weight_decay needs the parameters: call update(grads, state, params)")

        slots_of = {field: split(getattr(state, field)) for field in ("nu", "mu", "trace")}
        trees = {"params": params, **slots_of}
        real = () if self.variant.split_complex else ("nu",)
        columns, structure = _checks.columns(updates, trees, real=real, dtypes=storage.dtypes)
        # A schedule may mix dtypes as it likes, whatever the user asks of his own code.
        with jax.numpy_dtype_promotion("standard"):
            scalars = _equations.Hyper(
                *(_at(state.count, name, h) for name, h in self.hyper._asdict().items())
            )
            weight_sum = state.weight_sum
            if weight_sum is not None:
                scalars, weight_sum = _equations.correct_bias(scalars, weight_sum, state.count)
            numbers = _numbers(structure) if storage.draws else [None] * structure.num_leaves
            steps, slots = [], []
            for number, g, x, *old in zip(numbers, *columns, strict=True):
                moment = None if number is None else _equations.Moment(state.count, number)
                if g is None:
                    u, new = None, _equations.Slots(*old)
                else:
                    held = _equations.Slots(*old)
                    u, new = _equations.step(g, x, held, scalars, moment, self.variant)
                steps.append(u)
                slots.append(new)

        def tree_of(field: str) -> Any:
            tree = structure.unflatten([getattr(slot, field) for slot in slots])
            return join(getattr(state, field), tree)

        return structure.unflatten(steps), RMSPropState(
            count=_increment(state.count),
            nu=tree_of("nu"),
            mu=tree_of("mu") if in_use["mu"] else None,
            trace=tree_of("trace") if in_use["trace"] else None,
            weight_sum=weight_sum,
        )

    def _slots_in_use(self) -> dict[str, bool]:
        return {
            "mu": self.centered,
            "trace": self.hyper.momentum is not None,
            "weight_sum": self.bias_correction,
        }


_increment = jax.jit(optax.safe_increment)


@functools.lru_cache
def _numbers(structure: jax.tree_util.PyTreeDef) -> list[np.uint32]:
    """A number for each leaf, which depends only on its path."""
    leaves = structure.unflatten(range(structure.num_leaves))
    paths, _ = jax.tree_util.tree_flatten_with_path(leaves)
    return [np.uint32(zlib.crc32(_checks.leaf_name(path).encode())) for path, _ in paths]


def _at(count: jax.Array, name: str, value: Any) -> jax.Array | None:
    """A hyperparameter in the step after count others, as an array."""
    if callable(value):
        value = _checks.number(name, value(count), schedule=False)
    return jnp.asarray(value, float) if isinstance(value, float) else value


def rules_in(tx: Any) -> list[Rule]:
    """The rules that a transformation follows, itself or in what it wraps ready-made."""
    return [found for found in objects_in(tx) if isinstance(found, Rule)]


def rules_of(tx: Any) -> list[Rule]:
    """The rules in tx, at least one."""
    rules = rules_in(tx)
    if not rules:
        raise TypeError(f"tx must be an RMSProp of rmsprop_jax or have one in it, got {tx!r}")
    return rules


def objects_in(tx: Any) -> list[Any]:
    """The objects whose methods a transformation has as its update, itself or in what it wraps."""
    found = {id(value): value for value in _objects(getattr(tx, "update", None), set())}
    return list(found.values())


def _objects(value: Any, seen: set[int]) -> Iterator[Any]:
    """The objects whose methods are value, or what value is made of: the parts of a wrapper."""
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: list[Any] = []
    if inspect.ismethod(value):
        yield value.__self__
        if isinstance(value.__self__, Rule):
            return
        parts = list(getattr(value.__self__, "__dict__", {}).values())
    elif callable(value):
        for cell in getattr(value, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # a name that has no value yet
                parts.append(cell.cell_contents)
        parts.append(getattr(value, "__wrapped__", None))
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, tuple | list):
        parts = list(value)
    else:
        parts = [getattr(value, "update", None)]  # of a transformation that is no NamedTuple
    for part in parts:
        yield from _objects(part, seen)

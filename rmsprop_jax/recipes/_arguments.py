"""Helpers for the arguments of all recipes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, _gradients
from rmsprop_jax._schedule import Schedule
from rmsprop_jax._transformation import transformation
from rmsprop_jax._types import Scalar


def number(name: str, value: Any) -> Any:
    """A checked hyperparameter, which cannot be a schedule: the recipe has its own."""
    return _checks.number(name, value, schedule=False)


def above_0(name: str, value: Any) -> float:
    """A Python number above 0, as the length of a schedule must be."""
    value = number(name, value)
    if not isinstance(value, float):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be > 0, got {value:.15g}")
    return value


class Clipped(NamedTuple):
    """The transformation tx, applied to gradients clipped to the global norm max_norm.

    The norm is computed in at least float32: in float16, that of a few hundred gradients can be
    infinite. The state has the form of that of ``optax.chain``.
    """

    max_norm: float
    tx: optax.GradientTransformationExtraArgs

    def init(self, params: optax.Params) -> tuple[optax.EmptyState, optax.OptState]:
        return optax.EmptyState(), self.tx.init(params)

    def update(
        self,
        updates: optax.Updates,
        state: tuple[optax.EmptyState, optax.OptState],
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[optax.EmptyState, optax.OptState]]:
        updates = jax.tree.map(jnp.asarray, _gradients.without_float0(updates))
        wide = jax.tree.map(lambda g: g.astype(np.promote_types(g.dtype, np.float32)), updates)
        small, _ = optax.clip_by_global_norm(self.max_norm).update(wide, state[0])
        updates = jax.tree.map(lambda s, g: s.astype(g.dtype), small, updates)
        updates, inner = self.tx.update(updates, state[1], params, **extra_args)
        return updates, (state[0], inner)


def clipped(
    max_norm: float | None, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The transformation tx, clipped unless max_norm is None."""
    return tx if max_norm is None else transformation(Clipped(above_0("max_norm", max_norm), tx))


def stairs(learning_rate: Scalar, steps: float, factor: float) -> Schedule:
    """A learning rate that is multiplied by factor after every period of the given steps."""
    return Schedule(_stairs_at, (learning_rate, steps, factor))


def _stairs_at(count: jax.Array, learning_rate: Scalar, steps: float, factor: float) -> Any:
    if steps.is_integer():
        done = count // min(int(steps), 2**31 - 1)
    else:
        # A few units in the last place more, so that no integer quotient is rounded below itself.
        done = jnp.floor(count * ((1 + 4 * jnp.finfo(float).eps) / steps))
    return learning_rate * factor ** done.astype(float)

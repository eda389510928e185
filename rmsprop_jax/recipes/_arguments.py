"""What all recipes do with their arguments."""

from typing import Any

import optax

from rmsprop_jax import _checks


def number(name: str, value: Any) -> Any:
    """A hyperparameter, checked; the schedule, if there is one, is the recipe's own."""
    return _checks.number(name, value, schedule=False)


def above_0(name: str, value: Any) -> float:
    """A Python number above 0, as schedules need it for their lengths."""
    value = number(name, value)
    if not isinstance(value, float):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    if value <= 0:
        raise ValueError(f"{name} must be > 0, got {value:g}")
    return value


def clipped(
    max_norm: float | None, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The transformation tx, of gradients whose global norm is at most max_norm."""
    if max_norm is None:
        return tx
    return optax.chain(optax.clip_by_global_norm(above_0("max_norm", max_norm)), tx)


def decayed(
    weight_decay: Any, mask: Any, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The transformation tx, of the gradients of a loss plus weight_decay |x|^2 / 2."""
    weight_decay = number("weight_decay", weight_decay)
    if isinstance(weight_decay, float) and weight_decay == 0:
        return tx
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), tx)

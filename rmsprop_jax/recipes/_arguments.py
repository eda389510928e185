"""What all recipes do with their arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
        raise ValueError(f"{name} must be > 0, got {value:.15g}")
    return value


def clipped(
    max_norm: float | None, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The transformation tx, of gradients whose global norm is at most max_norm.

    The norm is taken in at least float32: of some hundred float16 gradients it can be infinite.
    """
    if max_norm is None:
        return tx
    clip = optax.clip_by_global_norm(above_0("max_norm", max_norm))

    def clip_wide(grads: Any, _: Any) -> Any:
        wide = jax.tree.map(lambda g: g.astype(np.promote_types(g.dtype, np.float32)), grads)
        small, _ = clip.update(wide, clip.init(grads))
        return jax.tree.map(lambda s, g: s.astype(g.dtype), small, grads)

    return optax.chain(optax.stateless(clip_wide), tx)


def stairs(learning_rate: Any, steps: float, factor: float) -> optax.Schedule:
    """A learning rate that is multiplied by a factor every so many steps."""

    def schedule(count: jax.Array) -> jax.Array:
        if steps.is_integer():
            done = count // min(int(steps), 2**31 - 1)
        else:
            # Some units in the last place more, lest a quotient that is whole come out below it.
            done = jnp.floor(count * ((1 + 4 * jnp.finfo(float).eps) / steps))
        return learning_rate * factor ** done.astype(float)

    return schedule

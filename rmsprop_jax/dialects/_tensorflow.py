"""TensorFlow 1, both generations of Keras, and Sonnet."""

import math
from typing import Any

import jax
import optax

from rmsprop_jax import _checks
from rmsprop_jax._rmsprop import rmsprop
from rmsprop_jax._schedule import Schedule
from rmsprop_jax._storage import Storage
from rmsprop_jax._types import Scalar, ScalarOrSchedule
from rmsprop_jax.dialects._arguments import at, checked, refuse_int, unless_0


def tensorflow_v1(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule = 1e-10,
    centered: bool = False,
    *,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``tf.compat.v1.train.RMSPropOptimizer``: s starts at 1, learning rate inside the buffer.

        s <- decay s + (1 - decay) g^2, from 1
        b <- momentum b + learning_rate g / sqrt(s + epsilon)
        x <- x - b

    Args:
      learning_rate: number, in units of the parameters per step.
      decay: number in [0, 1], the weight of the past in s.
      momentum: number of at least 0, the weight of the past in b.
      epsilon: number of at least 0, in units of the gradient squared.
      centered: whether s is the variance of the gradient instead of its second moment. A small
        epsilon can then make the run diverge: see :mod:`rmsprop_jax.dialects`.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = dialects.tensorflow_v1(0.1)
      >>> updates, _ = tx.update(jnp.array([3.0, -0.01]), tx.init(x))
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      -0.2236 0.0011

    Equals ``tf.compat.v1.train.RMSPropOptimizer`` of TensorFlow 2.21 on dense gradients. There,
    ``use_locking`` comes before ``centered``; it has no meaning here. TensorFlow computes 1 - decay
    in float32, which changes s by 1e-6 of its value at a decay of 0.99, and by 2e-4 at 0.9999. To
    reproduce that, pass the decay as an array: ``decay=jnp.float32(0.9999)``.

    Source: tensorflow/python/training/rmsprop.py.
    """
    learning_rate, decay, momentum, epsilon = checked(
        learning_rate=learning_rate, decay=decay, momentum=momentum, epsilon=epsilon
    )
    return rmsprop(
        learning_rate,
        decay,
        epsilon,
        initial_scale=1.0,
        centered=centered,
        momentum=unless_0(momentum),
        storage=storage,
    )


def keras(
    learning_rate: ScalarOrSchedule = 1e-3,
    rho: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule = 1e-7,
    centered: bool = False,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``keras.optimizers.RMSprop`` of Keras 3: s starts at 0, decoupled weight decay.

        s <- rho s + (1 - rho) g^2, from 0
        b <- momentum b + learning_rate g / sqrt(s + epsilon)
        x <- x - learning_rate weight_decay x - b

    Args:
      learning_rate: number, in units of the parameters per step; not an int, as in Keras.
      rho: number in [0, 1], the weight of the past in s.
      momentum: number of at least 0, the weight of the past in b.
      epsilon: number of at least 0, in units of the gradient squared.
      centered: whether s is the variance of the gradient instead of its second moment. A small
        epsilon can then make the run diverge: see :mod:`rmsprop_jax.dialects`.
      weight_decay: number of at least 0, in units of 1 / learning_rate; None for no decay.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = dialects.keras(0.1, weight_decay=0.5)
      >>> updates, _ = tx.update(jnp.array([3.0, 0.0]), tx.init(x), x)
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      -0.3662 0.1000

    Equals ``keras.optimizers.RMSprop`` of Keras 3.15. For its clipping, averaging of weights and
    accumulation of gradients use Optax, as "From Keras and TensorFlow" in the docs shows.

    Source: keras/src/optimizers/rmsprop.py and base_optimizer.py.
    """
    refuse_int("learning_rate", learning_rate)
    learning_rate, rho, momentum, epsilon = checked(
        learning_rate=learning_rate, rho=rho, momentum=momentum, epsilon=epsilon
    )
    if weight_decay is not None:
        (weight_decay,) = map(unless_0, checked(weight_decay=weight_decay))
    return rmsprop(
        learning_rate,
        rho,
        epsilon,
        centered=centered,
        momentum=unless_0(momentum),
        weight_decay=weight_decay,
        decoupled_weight_decay=weight_decay is not None,
        storage=storage,
    )


def keras_legacy(
    learning_rate: ScalarOrSchedule = 1e-3,
    rho: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule | None = 1e-7,
    centered: bool = False,
    *,
    decay: float = 0.0,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``tf.keras.optimizers.legacy.RMSprop``: epsilon is inside the root only with momentum.

        s <- rho s + (1 - rho) g^2, from 0
        b <- momentum b + learning_rate g / sqrt(s + epsilon)
        x <- x - b

    or, if momentum is the number 0, x <- x - learning_rate g / (sqrt(s) + epsilon).

    Args:
      learning_rate: number, in units of the parameters per step.
      rho: number in [0, 1], the weight of the past in s.
      momentum: number in [0, 1], the weight of the past in b; not an array.
      epsilon: number of at least 0, in units of the gradient squared with momentum, of the
        gradient without; 0 and None mean 1e-7, as in tf.keras.
      centered: whether s is the variance of the gradient instead of its second moment. A small
        epsilon can then make the run diverge: see :mod:`rmsprop_jax.dialects`.
      decay: number of at least 0: after t steps the learning rate is divided by 1 + decay t.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x, g = jnp.array(1.0), jnp.array(1e-6)
      >>> for momentum in (0.0, 0.9):
      ...     tx = dialects.keras_legacy(0.1, momentum=momentum)
      ...     updates, _ = tx.update(g, tx.init(x))
      ...     print(f"{updates:.5f}")
      -0.24025
      -0.00032

    Equals ``tf.keras.optimizers.legacy.RMSprop`` of tf_keras 2.21 (``OptimizerV2``) on dense
    gradients. Up to TensorFlow 2.10 it was called ``tf.keras.optimizers.RMSprop``.

    Source: tf_keras/src/optimizers/legacy/rmsprop.py and optimizer_v2.py.
    """
    if epsilon is None or unless_0(epsilon) is None:
        epsilon = 1e-7
    learning_rate, rho, momentum, epsilon = checked(
        learning_rate=learning_rate, rho=rho, momentum=momentum, epsilon=epsilon
    )
    if isinstance(momentum, float) and momentum > 1:
        raise ValueError(f"momentum must be >= 0 and <= 1, got {momentum}")
    if isinstance(momentum, jax.Array):
        raise TypeError(
            "momentum must be a number or a schedule, since epsilon is inside the root only "
            "with momentum, got an array; name it in static_args of optax.inject_hyperparams"
        )
    decay = _checks.number("decay", decay, (0, math.inf), schedule=False)
    momentum = unless_0(momentum)
    return rmsprop(
        learning_rate
        if unless_0(decay) is None
        else Schedule(_inverse_time, (learning_rate, decay)),
        rho,
        epsilon,
        eps_in_sqrt=momentum is not None,
        centered=centered,
        momentum=momentum,
        storage=storage,
    )


def sonnet(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule = 1e-10,
    centered: bool = False,
    *,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``sonnet.optimizers.RMSProp``: the rule of TensorFlow 1, except that s starts at 0.

        s <- decay s + (1 - decay) g^2, from 0
        b <- momentum b + learning_rate g / sqrt(s + epsilon)
        x <- x - b

    Args:
      learning_rate: number, in units of the parameters per step.
      decay: number in [0, 1], the weight of the past in s.
      momentum: number of at least 0, the weight of the past in b.
      epsilon: number of at least 0, in units of the gradient squared.
      centered: whether s is the variance of the gradient instead of its second moment. A small
        epsilon can then make the run diverge: see :mod:`rmsprop_jax.dialects`.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = dialects.sonnet(0.1)
      >>> updates, _ = tx.update(jnp.array([3.0, -0.01]), tx.init(x))
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      -0.3162 0.3162

    Equals ``sonnet.optimizers.RMSProp`` of Sonnet 2.0.2 on dense gradients.

    Source: sonnet/src/optimizers/rmsprop.py.
    """
    learning_rate, decay, momentum, epsilon = checked(
        learning_rate=learning_rate, decay=decay, momentum=momentum, epsilon=epsilon
    )
    return rmsprop(
        learning_rate,
        decay,
        epsilon,
        centered=centered,
        momentum=unless_0(momentum),
        storage=storage,
    )


def _inverse_time(count: jax.Array, learning_rate: ScalarOrSchedule, decay: Scalar) -> Any:
    return at(learning_rate, count) / (1 + decay * count)

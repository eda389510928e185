"""Reinforcement learning: DQN, IMPALA, A2C."""

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax._rmsprop import rmsprop
from rmsprop_jax._schedule import Schedule
from rmsprop_jax._storage import Storage
from rmsprop_jax._types import Scalar
from rmsprop_jax.dialects import pytorch, tensorflow_v1
from rmsprop_jax.recipes._arguments import above_0, clipped, number


def nature_dqn(
    learning_rate: Scalar = 2.5e-4, *, storage: Storage | None = None
) -> optax.GradientTransformationExtraArgs:
    """DQN as in the Nature paper: centered, decay 0.95, eps 0.01 inside the root, no momentum.

    The "gradient momentum" in the paper's table is the decay of the mean gradient, about which the
    variance is taken. The loss is summed over the 32 transitions of a batch, and each temporal
    difference is clipped to [-1, 1]; gradients are not clipped.

    Args:
      learning_rate: number, constant in the paper.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> from rmsprop_jax import describe, recipes
      >>> print(describe(recipes.nature_dqn()))
      v <- decay v + (1 - decay) |g|^2
      m <- decay m + (1 - decay) g
      s = v - |m|^2
      x <- x - learning_rate g / sqrt(s + eps)
      from v = 0
      with learning_rate 0.00025, decay 0.95, eps 0.01

    Sources: Mnih et al., "Human-level control through deep reinforcement learning", Nature 518,
    2015, extended data table 1; google-deepmind/dqn, dqn/NeuralQLearner.lua and run_gpu.
    """
    return rmsprop(
        number("learning_rate", learning_rate), 0.95, 0.01, centered=True, storage=storage
    )


def dqn_zoo(
    learning_rate: Scalar = 2.5e-4,
    *,
    batch_size: int = 32,
    eps: Scalar | None = None,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """DQN as in DQN Zoo: :func:`nature_dqn` for a loss that is a mean, hence eps 0.01 / 32^2.

    The temporal differences are clipped to [-1, 1], as in :func:`nature_dqn`.

    Args:
      learning_rate: number, constant in the source.
      batch_size: transitions in a batch; 32 in the source.
      eps: number of at least 0, in units of the gradient squared; None for 0.01 / batch_size^2.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import recipes
      >>> g = jnp.array([0.5, -2.0])
      >>> summed, mean = recipes.nature_dqn(), recipes.dqn_zoo()
      >>> update, _ = summed.update(g, summed.init(g))
      >>> again, _ = mean.update(g / 32, mean.init(g))
      >>> print(jnp.allclose(update, again, rtol=1e-6))
      True

    Source: google-deepmind/dqn_zoo, dqn_zoo/dqn/run_atari.py.
    """
    smallest = 0.01 / above_0("batch_size", batch_size) ** 2
    eps = smallest if eps is None else number("eps", eps)
    return rmsprop(
        number("learning_rate", learning_rate), 0.95, eps, centered=True, storage=storage
    )


def impala(
    total_steps: float,
    learning_rate: Scalar = 4.8e-4,
    *,
    eps: Scalar = 0.1,
    max_norm: float | None = None,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """IMPALA: TensorFlow 1's rule, decay 0.99, eps 0.1, learning rate falling to 0.

    These are the values of the authors' code, which does not clip gradients and sums its losses
    over batch and time. The Atari runs of the paper used learning_rate=6e-4, eps=0.01, max_norm=40.

    Args:
      total_steps: updates until the learning rate is 0: total frames / frames per update. In the
        code 1e9 / (32 * 100 * 4) = 78125.
      learning_rate: number, the rate of the first update.
      eps: number of at least 0, in units of the gradient squared.
      max_norm: maximum global norm of the gradients, above 0; None for no clipping.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> from rmsprop_jax import describe, recipes
      >>> print(describe(recipes.impala(78125)))
      s <- decay s + (1 - decay) |g|^2
      x <- x - learning_rate g / sqrt(s + eps)
      from s = 1
      with learning_rate a schedule, decay 0.99, eps 0.1

    Sources: Espeholt et al., arXiv:1802.01561, 2018; google-deepmind/scalable_agent,
    experiment.py.
    """
    tx = tensorflow_v1(
        _to_0(learning_rate, total_steps), 0.99, epsilon=number("eps", eps), storage=storage
    )
    return clipped(max_norm, tx)


def torchbeast(
    total_steps: float,
    learning_rate: Scalar = 4.8e-4,
    *,
    max_norm: float | None = 40.0,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """TorchBeast, IMPALA in PyTorch: decay 0.99, eps 0.01 outside the root, global norm 40.

    The losses are summed over batch and time.

    Args:
      total_steps: updates until the learning rate is 0: total agent steps / agent steps per
        update; the latter are 80 * 8 in the source.
      learning_rate: number, the rate of the first update.
      max_norm: maximum global norm of the gradients, above 0; None for no clipping.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> from rmsprop_jax import describe, recipes
      >>> print(describe(recipes.torchbeast(total_steps=30_000_000 / (80 * 8))))
      s <- decay s + (1 - decay) g^2
      x <- x - learning_rate g / (sqrt(s) + eps)
      from s = 0
      with learning_rate a schedule, decay 0.99, eps 0.01
      and 1 other transformation before it, not described

    Source: facebookresearch/torchbeast, torchbeast/monobeast.py and polybeast_learner.py.
    """
    tx = pytorch(_to_0(learning_rate, total_steps), 0.99, 0.01, storage=storage)
    return clipped(max_norm, tx)


def a2c(
    total_timesteps: float,
    batch_size: int,
    learning_rate: Scalar = 7e-4,
    *,
    max_norm: float | None = 0.5,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A2C as in OpenAI Baselines: TensorFlow 1's rule, decay 0.99, eps 1e-5, global norm 0.5.

    The learning rate falls to 0 with every timestep. Update k, counted from 0, uses the rate of the
    last of its timesteps: learning_rate (1 - ((k + 1) batch_size - 1) / total_timesteps).

    The losses are means over a batch. As gradients are below 0.5, it takes a few hundred updates
    until s forgets that it started at 1.

    Args:
      total_timesteps: timesteps until the learning rate is 0; 80e6 in the source.
      batch_size: timesteps per update; the number of environments times 5 in the source.
      learning_rate: number.
      max_norm: maximum global norm of the gradients, above 0; None for no clipping.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> from rmsprop_jax import describe, recipes
      >>> print(describe(recipes.a2c(80_000_000, batch_size=16 * 5)))
      s <- decay s + (1 - decay) |g|^2
      x <- x - learning_rate g / sqrt(s + eps)
      from s = 1
      with learning_rate a schedule, decay 0.99, eps 1e-05
      and 1 other transformation before it, not described

    Stable-Baselines3 has other defaults: PyTorch's rule and a constant learning rate. With its
    ``RMSpropTFLike`` the equivalent is ``dialects.stable_baselines3(7e-4, eps=1e-5)``.

    Source: openai/baselines, baselines/a2c/a2c.py.
    """
    rate = number("learning_rate", learning_rate)
    total, batch = above_0("total_timesteps", total_timesteps), above_0("batch_size", batch_size)
    schedule = Schedule(_within_an_update, (rate, total, batch))
    return clipped(max_norm, tensorflow_v1(schedule, 0.99, epsilon=1e-5, storage=storage))


def _within_an_update(count: jax.Array, rate: Scalar, total: float, batch: float) -> jax.Array:
    done = count * (batch / total) + (batch - 1) / total
    return rate * jnp.maximum(1 - done, 0)


def _to_0(learning_rate: Scalar, total_steps: float) -> Schedule:
    """A rate that falls linearly from learning_rate at the first update to 0 after total_steps."""
    rate, total = number("learning_rate", learning_rate), above_0("total_steps", total_steps)
    return Schedule(_line, (rate, total))


def _line(count: jax.Array, rate: Scalar, total: float) -> jax.Array:
    return rate * jnp.maximum(1 - count / total, 0)

"""Generative models: Wasserstein GAN."""

import optax

from rmsprop_jax._rule import Scalar
from rmsprop_jax._storage import Storage
from rmsprop_jax.dialects import pytorch
from rmsprop_jax.recipes._arguments import number


def wgan(
    learning_rate: Scalar = 5e-5, *, storage: Storage | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wasserstein GAN: PyTorch's RMSProp with its defaults but for the learning rate.

    One for the critic and one for the generator. The critic makes five steps for each of the
    generator's, and its weights are clipped to [-0.01, 0.01], as below.

    Args:
      learning_rate: number, constant in the paper.
      storage: how the state is held, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import recipes
      >>> critic = jnp.array([0.01, 0.0])
      >>> tx = recipes.wgan()
      >>> updates, state = tx.update(jnp.array([-1.0, 1.0]), tx.init(critic))
      >>> critic = optax.apply_updates(critic, updates)
      >>> critic = optax.projections.projection_box(critic, -0.01, 0.01)
      >>> print(f"{critic[0]:.4f} {critic[1]:.4f}")
      0.0100 -0.0005

    Sources: Arjovsky, Chintala and Bottou, arXiv:1701.07875, 2017, algorithm 1, which names no
    decay and no eps; martinarjovsky/WassersteinGAN, main.py, which leaves them at PyTorch's.
    """
    return pytorch(number("learning_rate", learning_rate), storage=storage)

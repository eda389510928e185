"""Models trained in PyTorch: torchvision's MobileNetV3 and the Wasserstein GAN."""

import optax

from rmsprop_jax._storage import Storage
from rmsprop_jax._types import Scalar
from rmsprop_jax.dialects import pytorch
from rmsprop_jax.recipes._arguments import above_0, number, stairs


def torchvision_mobilenet_v3(
    steps_per_epoch: float = 1252,
    learning_rate: Scalar = 0.064,
    *,
    weight_decay: Scalar = 1e-5,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MobileNetV3 in torchvision: PyTorch's rule, alpha and momentum 0.9, eps 0.0316.

    This eps, outside the root, corresponds to TensorFlow's 0.001 inside it. The learning rate is
    multiplied by 0.973 every two epochs. Weight decay applies to all parameters.

    Args:
      steps_per_epoch: updates per epoch; 1252 with 8 devices and 128 images on each.
      learning_rate: number, the rate during the first two epochs.
      weight_decay: number of at least 0, in units of gradient / parameter; coupled.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> from rmsprop_jax import describe, recipes
      >>> print(describe(recipes.torchvision_mobilenet_v3()))
      g <- g + weight_decay x
      s <- decay s + (1 - decay) g^2
      b <- momentum b + g / (sqrt(s) + eps)
      x <- x - learning_rate b
      from s = 0
      with learning_rate a schedule, decay 0.9, eps 0.0316, momentum 0.9, weight_decay 1e-05

    Source: pytorch/vision, references/classification/README.md and train.py.
    """
    epoch = above_0("steps_per_epoch", steps_per_epoch)
    return pytorch(
        stairs(number("learning_rate", learning_rate), 2 * epoch, 0.973),
        0.9,
        0.0316,
        number("weight_decay", weight_decay),
        0.9,
        storage=storage,
    )


def wgan(
    learning_rate: Scalar = 5e-5, *, storage: Storage | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wasserstein GAN: PyTorch's RMSProp with its defaults, except for the learning rate.

    Use one for the critic and one for the generator. The critic takes five steps for each step of
    the generator, and its parameters are clipped to [-0.01, 0.01], as in the example.

    Args:
      learning_rate: number, constant in the paper.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

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

    Sources: Arjovsky, Chintala and Bottou, arXiv:1701.07875, 2017, algorithm 1, which gives
    neither decay nor eps; martinarjovsky/WassersteinGAN, main.py, which keeps PyTorch's defaults.
    """
    return pytorch(number("learning_rate", learning_rate), storage=storage)

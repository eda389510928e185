"""JAX's own examples, MLX, Paddle, and two texts that write the rule down themselves."""

import optax

from rmsprop_jax._rmsprop import rmsprop
from rmsprop_jax._storage import Storage
from rmsprop_jax._types import ScalarOrSchedule
from rmsprop_jax.dialects._arguments import checked, refuse_int, unless_0


def jax_example(
    step_size: ScalarOrSchedule,
    gamma: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    momentum: ScalarOrSchedule | None = None,
    *,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``rmsprop`` and ``rmsprop_momentum`` of ``jax.example_libraries.optimizers``.

        s <- gamma s + (1 - gamma) g^2, from 0
        b <- momentum b + step_size g / sqrt(s + eps)
        x <- x - b

    Args:
      step_size: number, in units of the parameters per step.
      gamma: number in [0, 1], the weight of the past in s.
      eps: number of at least 0, in units of the gradient squared.
      momentum: number of at least 0, the weight of the past in b; ``rmsprop_momentum`` has 0.9 by
        default. None for ``rmsprop``.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = dialects.jax_example(0.1, momentum=0.9)
      >>> updates, _ = tx.update(jnp.array([3.0, -0.01]), tx.init(x))
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      -0.3162 0.3161

    Without momentum it equals ``jax.example_libraries.optimizers.rmsprop`` of JAX 0.10, and with
    momentum ``rmsprop_momentum``, on real parameters.

    Source: jax/example_libraries/optimizers.py.
    """
    step_size, gamma, eps = checked(step_size=step_size, gamma=gamma, eps=eps)
    if momentum is not None:
        (momentum,) = map(unless_0, checked(momentum=momentum))
    return rmsprop(step_size, gamma, eps, momentum=momentum, storage=storage)


def mlx(
    learning_rate: ScalarOrSchedule,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    *,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``mlx.optimizers.RMSprop``: eps outside the root, no momentum, no weight decay.

        s <- alpha s + (1 - alpha) g^2, from 0
        x <- x - learning_rate g / (sqrt(s) + eps)

    Args:
      learning_rate: number, in units of the parameters per step.
      alpha: number in [0, 1], the weight of the past in s.
      eps: number above 0, in units of the gradient.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = dialects.mlx(0.1)
      >>> updates, _ = tx.update(jnp.array([3.0, -0.01]), tx.init(x))
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      -1.0000 1.0000

    Equals ``mlx.optimizers.RMSprop`` of MLX 0.32.

    Source: python/mlx/optimizers/optimizers.py.
    """
    learning_rate, alpha, eps = checked(learning_rate=learning_rate, alpha=alpha, eps=eps)
    if unless_0(eps) is None:
        raise ValueError(f"eps must be > 0, got {eps!r}")
    return rmsprop(learning_rate, alpha, eps, eps_in_sqrt=False, storage=storage)


def paddle(
    learning_rate: ScalarOrSchedule,
    rho: ScalarOrSchedule = 0.95,
    epsilon: ScalarOrSchedule = 1e-6,
    momentum: ScalarOrSchedule = 0.0,
    centered: bool = False,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``paddle.optimizer.RMSProp``: the rule of Keras with coupled weight decay.

        g <- g + weight_decay x
        s <- rho s + (1 - rho) g^2, from 0
        b <- momentum b + learning_rate g / sqrt(s + epsilon)
        x <- x - b

    Args:
      learning_rate: number, in units of the parameters per step; not an int, as in Paddle.
      rho: number in [0, 1], the weight of the past in s.
      epsilon: number of at least 0, in units of the gradient squared.
      momentum: number of at least 0, the weight of the past in b.
      centered: whether s is the variance of the gradient instead of its second moment. A small
        epsilon can then make the run diverge: see :mod:`rmsprop_jax.dialects`.
      weight_decay: number of at least 0, in units of gradient / parameter; None for no decay.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = dialects.paddle(0.1, weight_decay=0.5)
      >>> updates, _ = tx.update(jnp.array([3.0, 0.0]), tx.init(x), x)
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      -0.4472 0.4472

    Equals ``paddle.optimizer.RMSProp`` of PaddlePaddle 3.3.

    Source: python/paddle/optimizer/rmsprop.py.
    """
    refuse_int("learning_rate", learning_rate)
    learning_rate, rho, epsilon, momentum = checked(
        learning_rate=learning_rate, rho=rho, epsilon=epsilon, momentum=momentum
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
        storage=storage,
    )


def graves(
    learning_rate: ScalarOrSchedule = 1e-4,
    decay: ScalarOrSchedule = 0.95,
    momentum: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-4,
    *,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Graves 2013, equations 38 to 45: the first centered form, with momentum.

        n <- decay n + (1 - decay) g^2, from 0
        m <- decay m + (1 - decay) g, from 0
        b <- momentum b + learning_rate g / sqrt(n - m^2 + eps)
        x <- x - b

    Args:
      learning_rate: number, in units of the parameters per step; gimel in the paper.
      decay: number in [0, 1], the weight of the past in n and m; aleph.
      momentum: number of at least 0, the weight of the past in b; beth.
      eps: number of at least 0, in units of the gradient squared; daleth.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = dialects.graves()
      >>> updates, _ = tx.update(jnp.array([3.0, -0.01]), tx.init(x))
      >>> print(f"{updates[0]:.6f} {updates[1]:.6f}")
      -0.000459 0.000098

    The paper clips the derivatives inside the network, before they reach the optimizer.

    Source: Graves, "Generating sequences with recurrent neural networks", arXiv:1308.0850, 2013.
    """
    learning_rate, decay, momentum, eps = checked(
        learning_rate=learning_rate, decay=decay, momentum=momentum, eps=eps
    )
    return rmsprop(
        learning_rate, decay, eps, centered=True, momentum=unless_0(momentum), storage=storage
    )


def d2l(
    lr: ScalarOrSchedule = 0.01,
    gamma: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-6,
    *,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The rule of "Dive into Deep Learning", section 12.8, implemented there from scratch.

        s <- gamma s + (1 - gamma) g^2, from 0
        x <- x - lr g / sqrt(s + eps)

    Args:
      lr: number of at least 0, in units of the parameters per step.
      gamma: number in [0, 1], the weight of the past in s.
      eps: number of at least 0, in units of the gradient squared.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([-5.0, -2.0])
      >>> tx = dialects.d2l(lr=0.4)
      >>> updates, _ = tx.update(jnp.array([-1.0, -8.0]), tx.init(x))
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      1.2649 1.2649

    The concise versions in the book are those of the frameworks, with another eps and start value:
    :func:`pytorch`, :func:`keras`.

    Source: Zhang, Lipton, Li and Smola, "Dive into deep learning", arXiv:2106.11342.
    """
    lr, gamma, eps = checked(lr=lr, gamma=gamma, eps=eps)
    return rmsprop(lr, gamma, eps, storage=storage)

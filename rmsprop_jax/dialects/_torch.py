"""PyTorch, and two optimizers written in PyTorch to act like TensorFlow's."""

from typing import Any

import jax
import optax

from rmsprop_jax import _checks
from rmsprop_jax._rmsprop import rmsprop
from rmsprop_jax._schedule import Schedule
from rmsprop_jax._storage import Storage
from rmsprop_jax._types import Scalar, ScalarOrSchedule
from rmsprop_jax.dialects._arguments import at, checked, unless_0


def pytorch(
    lr: ScalarOrSchedule = 1e-2,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0,
    momentum: ScalarOrSchedule = 0,
    centered: bool = False,
    *,
    maximize: bool = False,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``torch.optim.RMSprop``: eps outside the root, learning rate applied after the buffer.

        g <- g + weight_decay x
        s <- alpha s + (1 - alpha) g^2, from 0
        b <- momentum b + g / (sqrt(s) + eps)
        x <- x - lr b

    Args:
      lr: number of at least 0, in units of the parameters per step.
      alpha: number in [0, 1], the weight of the past in s.
      eps: number of at least 0, in units of the gradient.
      weight_decay: number of at least 0, in units of gradient / parameter; coupled.
      momentum: number of at least 0, the weight of the past in b.
      centered: whether s is the variance of the gradient instead of its second moment. A small
        eps can then make the run diverge: see :mod:`rmsprop_jax.dialects`.
      maximize: whether g is negated, before weight decay is added.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`. Complex
      parameters count as pairs of real ones. PyTorch's ``.grad`` is the conjugate of ``jax.grad``.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = dialects.pytorch(lr=0.1, weight_decay=0.5)
      >>> updates, _ = tx.update(jnp.array([3.0, 0.0]), tx.init(x), x)
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      -1.0000 1.0000

    Equals ``torch.optim.RMSprop`` of PyTorch 2.13. The arguments ``capturable``, ``foreach`` and
    ``differentiable`` choose an implementation there, and do not change the result.
    ``optax.rmsprop`` with ``eps_in_sqrt=False`` differs from it if there is momentum and a
    scheduled learning rate.

    Source: torch/optim/rmsprop.py.
    """
    lr, alpha, eps, weight_decay, momentum = checked(
        lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum
    )
    return rmsprop(
        lr,
        alpha,
        eps,
        eps_in_sqrt=False,
        centered=centered,
        momentum=unless_0(momentum),
        lr_in_momentum=False,
        weight_decay=unless_0(weight_decay),
        maximize=maximize,
        split_complex=True,
        storage=storage,
    )


def timm(
    lr: ScalarOrSchedule = 1e-2,
    alpha: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-10,
    weight_decay: ScalarOrSchedule = 0,
    momentum: ScalarOrSchedule = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    corrected_weight_decay: bool = False,
    lr_in_momentum: bool = True,
    caution: bool = False,
    *,
    initial_lr: Scalar | None = None,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``timm.optim.RMSpropTF``: the rule of TensorFlow 1 in PyTorch, with more weight decays.

        g <- g + weight_decay x
        s <- alpha s + (1 - alpha) g^2, from 1
        b <- momentum b + lr g / sqrt(s + eps)
        x <- x - b

    Args:
      lr: number of at least 0, in units of the parameters per step.
      alpha: number in [0, 1], the weight of the past in s.
      eps: number of at least 0, in units of the gradient squared.
      weight_decay: number of at least 0, in units of gradient / parameter, or of 1 / lr if
        decoupled.
      momentum: number of at least 0, the weight of the past in b.
      centered: whether s is the variance of the gradient instead of its second moment. A small
        eps can then make the run diverge: see :mod:`rmsprop_jax.dialects`.
      decoupled_decay: whether the weight decay is x <- (1 - lr weight_decay) x instead.
      corrected_weight_decay: whether that decay is reduced while lr is below initial_lr:
        x <- (1 - lr^2 / initial_lr weight_decay) x. Has no effect without decoupled_decay, as in
        timm.
      lr_in_momentum: whether lr is part of the buffer or multiplies it afterwards.
      caution: whether to drop the elements in which the step does not have the sign of the
        gradient, and to scale up the others. Has no effect without momentum, as in timm.
      initial_lr: the lr with which timm's optimizer would be constructed, the peak of a schedule;
        used if the decay is corrected. None for lr itself, if that is a Python number.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range, or if a corrected
        decay lacks its initial_lr.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = dialects.timm(lr=0.1, weight_decay=0.5, decoupled_decay=True)
      >>> updates, _ = tx.update(jnp.array([3.0, 0.0]), tx.init(x), x)
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      -0.2736 0.1000

    Equals ``RMSpropTF`` of timm 1.0.31. There, ``foreach`` only chooses an implementation.

    Sources: timm/optim/rmsprop_tf.py; Defazio, arXiv:2506.02285, 2025 (the corrected decay).
    """
    lr, alpha, eps, weight_decay, momentum = checked(
        lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum
    )
    momentum, weight_decay = unless_0(momentum), unless_0(weight_decay)
    decoupled = _checks.flag("decoupled_decay", decoupled_decay) and weight_decay is not None
    if initial_lr is not None:
        initial_lr = _checks.number("initial_lr", initial_lr, schedule=False)
    if _checks.flag("corrected_weight_decay", corrected_weight_decay):
        peak = _peak(lr, initial_lr)
        if decoupled:
            weight_decay = _corrected(weight_decay, lr, peak)
    return rmsprop(
        lr,
        alpha,
        eps,
        initial_scale=1.0,
        centered=centered,
        momentum=momentum,
        lr_in_momentum=lr_in_momentum,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled,
        cautious=_checks.flag("caution", caution) and momentum is not None,
        storage=storage,
    )


def stable_baselines3(
    lr: ScalarOrSchedule = 1e-2,
    alpha: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0,
    momentum: ScalarOrSchedule = 0,
    centered: bool = False,
    *,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``RMSpropTFLike`` of Stable-Baselines3: eps inside the root, s starts at 1.

        g <- g + weight_decay x
        s <- alpha s + (1 - alpha) g^2, from 1
        b <- momentum b + g / sqrt(s + eps)
        x <- x - lr b

    Args:
      lr: number of at least 0, in units of the parameters per step.
      alpha: number in [0, 1], the weight of the past in s.
      eps: number of at least 0, in units of the gradient squared.
      weight_decay: number of at least 0, in units of gradient / parameter; coupled.
      momentum: number of at least 0, the weight of the past in b.
      centered: whether s is the variance of the gradient instead of its second moment. A small
        eps can then make the run diverge: see :mod:`rmsprop_jax.dialects`.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, as from :func:`rmsprop_jax.rmsprop`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> x = jnp.array([1.0, -2.0])
      >>> tx = dialects.stable_baselines3(lr=0.1)
      >>> updates, _ = tx.update(jnp.array([3.0, -0.01]), tx.init(x))
      >>> print(f"{updates[0]:.4f} {updates[1]:.4f}")
      -0.2887 0.0010

    Equals ``stable_baselines3.common.sb2_compat.rmsprop_tf_like.RMSpropTFLike`` of
    Stable-Baselines3 2.9. Unlike TensorFlow's, its buffer omits the learning rate.

    Source: stable_baselines3/common/sb2_compat/rmsprop_tf_like.py.
    """
    lr, alpha, eps, weight_decay, momentum = checked(
        lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum
    )
    return rmsprop(
        lr,
        alpha,
        eps,
        initial_scale=1.0,
        centered=centered,
        momentum=unless_0(momentum),
        lr_in_momentum=False,
        weight_decay=unless_0(weight_decay),
        storage=storage,
    )


def _peak(lr: ScalarOrSchedule, initial_lr: Scalar | None) -> Any:
    """The lr of timm's constructor; None if unknown."""
    name, peak = ("lr", lr) if initial_lr is None else ("initial_lr", initial_lr)
    if isinstance(peak, float) and peak <= 0:
        raise ValueError(f"corrected_weight_decay=True needs {name} > 0, got {peak}")
    return peak if name == "initial_lr" or isinstance(lr, float) else None


def _corrected(
    weight_decay: ScalarOrSchedule, lr: ScalarOrSchedule, peak: Scalar | None
) -> Schedule:
    if peak is None:
        raise ValueError(
            "corrected_weight_decay=True needs initial_lr, the lr that timm is constructed with, "
            "when lr is a schedule or an array"
        )
    return Schedule(_corrected_at, (weight_decay, lr, peak))


def _corrected_at(
    count: jax.Array, weight_decay: ScalarOrSchedule, lr: ScalarOrSchedule, peak: Scalar
) -> Any:
    return at(weight_decay, count) * (at(lr, count) / peak)

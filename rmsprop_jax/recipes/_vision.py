"""Image models trained in TensorFlow 1: Inception, MobileNetV2 and V3, EfficientNet."""

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax._rmsprop import rmsprop
from rmsprop_jax._schedule import Schedule
from rmsprop_jax._storage import Storage
from rmsprop_jax._types import PyTree, Scalar
from rmsprop_jax.recipes._arguments import above_0, clipped, number, stairs


def inception(
    steps_per_epoch: float,
    learning_rate: Scalar = 0.045,
    *,
    momentum: Scalar = 0.9,
    max_norm: float | None = None,
    weight_decay: Scalar = 4e-5,
    mask: PyTree = None,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Inception v3 and v4: TensorFlow 1's rule, decay 0.9, eps 1, rate x 0.94 every two epochs.

    The momentum is that of the authors' code; the papers say that an earlier run had it. Only the
    paper on v3 clips gradients, at the norm 2.

    Not part of the optimizer: evaluation uses an average of the parameters with decay 0.9999
    (``optax.incremental_update``), and labels are smoothed by 0.1.

    Args:
      steps_per_epoch: updates per epoch; 1281167 / 1600 with 50 workers and 32 images on each.
      learning_rate: number, the rate during the first two epochs.
      momentum: number of at least 0.
      max_norm: maximum global norm of the gradients, above 0; None for no clipping.
      weight_decay: number of at least 0; adds ``weight_decay |x|^2 / 2`` to the loss.
      mask: which parameters decay, as in ``optax.add_decayed_weights``; None for all. The source
        decays the kernels of convolutions and of fully connected layers.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> from rmsprop_jax import describe, recipes
      >>> print(describe(recipes.inception(1281167 / 1600)))
      g <- g + weight_decay x
      s <- decay s + (1 - decay) |g|^2
      b <- momentum b + learning_rate g / sqrt(s + eps)
      x <- x - b
      from s = 1
      with learning_rate a schedule, decay 0.9, eps 1, momentum 0.9, weight_decay 4e-05

    Sources: Szegedy et al., arXiv:1512.00567, 2015, and arXiv:1602.07261, 2016; tensorflow/models,
    inception/inception/inception_distributed_train.py (of 2016).
    """
    schedule = _stairs(learning_rate, 2 * above_0("steps_per_epoch", steps_per_epoch), 0.94)
    momentum = number("momentum", momentum)
    return _tensorflow(schedule, momentum, 1.0, weight_decay, mask, storage, max_norm)


def mobilenet_v2(
    steps_per_epoch: float,
    learning_rate: Scalar = 0.045,
    *,
    epochs_per_decay: float = 1.0,
    weight_decay: Scalar = 4e-5,
    mask: PyTree = None,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MobileNetV2: TensorFlow 1's rule, decay and momentum 0.9, eps 1, rate x 0.98 every epoch.

    The paper does not give eps; 1 is the default of the authors' training code. Their published run
    has learning_rate=0.36 and epochs_per_decay=2.5 at a batch size of 768, and evaluates an average
    of the parameters with decay 0.9999 (``optax.incremental_update``), which is not part of the
    optimizer.

    Args:
      steps_per_epoch: updates per epoch; 1281167 / 96 for each of the 16 workers in the paper.
      learning_rate: number, the rate during the first epoch.
      epochs_per_decay: number above 0, the epochs between two steps of the schedule.
      weight_decay: number of at least 0; adds ``weight_decay |x|^2 / 2`` to the loss.
      mask: which parameters decay, as in ``optax.add_decayed_weights``; None for all. The source
        decays the kernels of convolutions, except depthwise ones.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> from rmsprop_jax import describe, recipes
      >>> print(describe(recipes.mobilenet_v2(1281167 / 96)))
      g <- g + weight_decay x
      s <- decay s + (1 - decay) |g|^2
      b <- momentum b + learning_rate g / sqrt(s + eps)
      x <- x - b
      from s = 1
      with learning_rate a schedule, decay 0.9, eps 1, momentum 0.9, weight_decay 4e-05

    Sources: Sandler et al., arXiv:1801.04381, 2018, section 6.1; tensorflow/models,
    research/slim/train_image_classifier.py and nets/mobilenet/README.md.
    """
    epoch = above_0("steps_per_epoch", steps_per_epoch)
    schedule = _stairs(learning_rate, epoch * above_0("epochs_per_decay", epochs_per_decay), 0.98)
    return _tensorflow(schedule, 0.9, 1.0, weight_decay, mask, storage)


def mobilenet_v3(
    steps_per_epoch: float,
    learning_rate: Scalar = 0.1,
    *,
    warmup_epochs: float = 0.0,
    weight_decay: Scalar = 1e-5,
    mask: PyTree = None,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MobileNetV3: TensorFlow 1's rule, decay and momentum 0.9, eps 0.002.

    The learning rate is multiplied by 0.99 every three epochs. Its default is that of the paper, at
    a batch size of 4096. The paper does not give eps; 0.002 is in the command that the authors
    published, which has learning_rate=0.16 and warmup_epochs=5 at a batch size of 1536.

    Not part of the optimizer: evaluation uses an average of the parameters with decay 0.9999
    (``optax.incremental_update``).

    Args:
      steps_per_epoch: updates per epoch; 1281167 / 4096 in the paper.
      learning_rate: number, the rate during the first three epochs.
      warmup_epochs: number of at least 0. The learning rate rises linearly from 0, with a slope
        that would reach ``learning_rate`` after so many epochs, until it meets the falling
        schedule.
      weight_decay: number of at least 0; adds ``weight_decay |x|^2 / 2`` to the loss.
      mask: which parameters decay, as in ``optax.add_decayed_weights``; None for all. The source
        decays the kernels of convolutions, except depthwise ones.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> from rmsprop_jax import describe, recipes
      >>> print(describe(recipes.mobilenet_v3(1281167 / 4096)))
      g <- g + weight_decay x
      s <- decay s + (1 - decay) |g|^2
      b <- momentum b + learning_rate g / sqrt(s + eps)
      x <- x - b
      from s = 1
      with learning_rate a schedule, decay 0.9, eps 0.002, momentum 0.9, weight_decay 1e-05

    Sources: Howard et al., arXiv:1905.02244, 2019, section 6.1.1; tensorflow/models,
    research/slim/nets/mobilenet/README.md.
    """
    epoch = above_0("steps_per_epoch", steps_per_epoch)
    peak = number("learning_rate", learning_rate)
    falling = _stairs(peak, 3 * epoch, 0.99)
    schedule = Schedule(_lower, (peak, _warmup_steps(warmup_epochs, epoch), falling))
    return _tensorflow(schedule, 0.9, 0.002, weight_decay, mask, storage)


def efficientnet(
    steps_per_epoch: float,
    learning_rate: Scalar = 0.256,
    *,
    warmup_epochs: float = 5.0,
    weight_decay: Scalar = 1e-5,
    mask: PyTree = None,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """EfficientNet and MnasNet: TensorFlow 1's rule, decay and momentum 0.9, eps 0.001.

    The learning rate rises linearly from 0 for five epochs, and is then multiplied by 0.97 every
    2.4 epochs, counted from the first step. So it drops by two such factors when the rise ends,
    which ``optax.warmup_exponential_decay_schedule`` does not do.

    Not part of the optimizer: evaluation uses an average of the parameters with decay 0.9999
    (``optax.incremental_update``).

    Args:
      steps_per_epoch: updates per epoch; 1281167 / 4096 in the paper.
      learning_rate: number, the peak of the schedule: 0.016 for every 256 images in a batch.
      warmup_epochs: number of at least 0, the epochs of the linear rise.
      weight_decay: number of at least 0; adds ``weight_decay |x|^2 / 2`` to the loss.
      mask: which parameters decay, as in ``optax.add_decayed_weights``; None for all. The source
        decays all except those of batch normalization.
      storage: how the state is stored, as in :func:`rmsprop_jax.rmsprop`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: if an argument is of the wrong type or out of range.

    Example:
      >>> from rmsprop_jax import describe, recipes
      >>> print(describe(recipes.efficientnet(1281167 / 4096)))
      g <- g + weight_decay x
      s <- decay s + (1 - decay) |g|^2
      b <- momentum b + learning_rate g / sqrt(s + eps)
      x <- x - b
      from s = 1
      with learning_rate a schedule, decay 0.9, eps 0.001, momentum 0.9, weight_decay 1e-05

    Sources: Tan and Le, arXiv:1905.11946, 2019; Tan et al., arXiv:1807.11626, 2018 (MnasNet);
    tensorflow/tpu, models/official/efficientnet/main.py and utils.py.
    """
    epoch = above_0("steps_per_epoch", steps_per_epoch)
    peak = number("learning_rate", learning_rate)
    falling = stairs(peak, 2.4 * epoch, 0.97)
    schedule = Schedule(_in_turn, (peak, _warmup_steps(warmup_epochs, epoch), falling))
    return _tensorflow(schedule, 0.9, 0.001, weight_decay, mask, storage)


def _lower(count: jax.Array, peak: Scalar, warmup: int, falling: Schedule) -> jax.Array:
    """The lower of a rate that rises to its peak and one that falls."""
    return jnp.minimum(peak * count / warmup if warmup else jnp.inf, falling(count))


def _in_turn(count: jax.Array, peak: Scalar, warmup: int, falling: Schedule) -> jax.Array:
    """A rate that rises to its peak, followed by one that falls."""
    return jnp.where(count < warmup, peak * count / max(warmup, 1), falling(count))


def _stairs(learning_rate: Scalar, steps: float, factor: float) -> Schedule:
    """A step decay whose period is truncated to an integer, as in TensorFlow's training code."""
    return stairs(number("learning_rate", learning_rate), float(max(int(steps), 1)), factor)


def _tensorflow(
    schedule: Schedule,
    momentum: Scalar,
    eps: float,
    weight_decay: Scalar,
    mask: PyTree,
    storage: Storage | None,
    max_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """TensorFlow 1's rule for the gradients of a loss plus weight_decay |x|^2 / 2."""
    weight_decay = number("weight_decay", weight_decay)
    absent = isinstance(weight_decay, float) and weight_decay == 0
    apart = not absent and (mask is not None or max_norm is not None)
    tx = rmsprop(
        schedule,
        0.9,
        eps,
        initial_scale=1.0,
        momentum=momentum,
        weight_decay=None if absent or apart else weight_decay,
        storage=storage,
    )
    tx = clipped(max_norm, tx)
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), tx) if apart else tx


def _warmup_steps(warmup_epochs: float, steps_per_epoch: float) -> int:
    epochs = number("warmup_epochs", warmup_epochs)
    if not isinstance(epochs, float) or epochs < 0:
        raise ValueError(f"warmup_epochs must be a Python number >= 0, got {warmup_epochs!r}")
    return int(epochs * steps_per_epoch)

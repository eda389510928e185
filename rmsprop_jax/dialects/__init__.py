"""The RMSProp of each framework, exactly: its argument names, order, defaults and refusals.

    from rmsprop_jax import dialects
    tx = dialects.pytorch(lr=1e-2, alpha=0.99)

Each dialect is :func:`rmsprop_jax.rmsprop` with some of its switches set. They have in common:

- A number may also be an array, or a schedule of the step count, as in ``rmsprop``. Pass the
  schedule of the learning rate rather than its current value: whether the learning rate is applied
  before or after the momentum buffer makes a difference as soon as it changes.
- If momentum or weight decay is the number 0, the term is absent, and so is its part of the state.
- ``optax.inject_hyperparams`` turns all numbers into arrays, and a term given as an array is never
  absent. Exclude those numbers by name: ``optax.inject_hyperparams(dialects.pytorch,
  static_args=("weight_decay", "momentum"))(lr=0.1)``.
- Whatever the framework refuses raises ``ValueError`` or ``TypeError``, and so does whatever
  ``rmsprop`` refuses: a decay above 1, numbers that are negative or not finite.
- The mean of the squared gradients is computed as in ``rmsprop``: in at least float32, and without
  the cancellation that lets the centered form turn to NaN in each of these frameworks.
- With an eps as small as 1e-8 a centered run can diverge, since the step grows up to
  ``learning_rate |g| / sqrt(eps)`` where the variance goes to 0; use 1e-4 to 1e-2, as Graves and
  DQN did. Outside the root (``pytorch``, and ``keras_legacy`` without momentum) the bound is
  ``learning_rate |g| / eps``, and 1e-2 to 1e-1 has the same effect.
- ``storage`` says how the state is stored, as in ``rmsprop``.

``optax.rmsprop`` needs no dialect: it is ``rmsprop`` itself.
"""

from rmsprop_jax.dialects._others import d2l, graves, jax_example, mlx, paddle
from rmsprop_jax.dialects._tensorflow import keras, keras_legacy, sonnet, tensorflow_v1
from rmsprop_jax.dialects._torch import pytorch, stable_baselines3, timm

__all__ = [
    "d2l",
    "graves",
    "jax_example",
    "keras",
    "keras_legacy",
    "mlx",
    "paddle",
    "pytorch",
    "sonnet",
    "stable_baselines3",
    "tensorflow_v1",
    "timm",
]

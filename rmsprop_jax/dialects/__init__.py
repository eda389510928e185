"""Every framework's RMSProp, exactly: its parameter names, order, defaults and refusals.

    from rmsprop_jax import dialects
    tx = dialects.pytorch(lr=1e-2, alpha=0.99)

Each is :func:`rmsprop_jax.rmsprop` with some of its switches set. What they have in common:

- Numbers may be arrays, or schedules of the step count, as in ``rmsprop``. Pass the learning
  rate's schedule, not the present value: where it stands relative to the momentum buffer shows
  as soon as it changes.
- The number 0 as momentum or weight decay means that the term is absent, and with it its part of
  the state.
- ``optax.inject_hyperparams`` makes arrays of all numbers, also of those that mean absence, and
  what is in an array is there. Name them: ``optax.inject_hyperparams(dialects.pytorch,
  static_args=("weight_decay", "momentum"))(lr=0.1)``.
- What the framework refuses is refused, with ``ValueError`` or ``TypeError``, and so is what
  ``rmsprop`` refuses: a decay above 1, numbers that are negative or not finite.
- Gradients are summed up as in ``rmsprop``: in at least float32, and without the cancellation
  that lets the centered form turn to NaN in each of these frameworks.
- ``storage`` says how the state is held, as in ``rmsprop``.

``optax.rmsprop`` is ``rmsprop`` itself.
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

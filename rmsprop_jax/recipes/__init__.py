"""Published settings by name, with the values of the paper or of the authors' code.

    from rmsprop_jax import recipes
    tx = recipes.nature_dqn()

A recipe is a dialect with its numbers and its schedule, chained with what else belongs to the
optimizer: gradient clipping, and weight decay where it is part of the loss. The docstring says what
belongs to the published setting but not to the optimizer: averaged parameters, clipped parameters,
how the loss is reduced. A setting means little without them.

Schedules count updates. Recipes for image models take ``steps_per_epoch``, the number of training
images divided by the batch size, which need not be an integer.

Clipping and weight decay ahead of RMSProp are those of Optax, with their limits: if the norm is
clipped and one gradient is infinite, that gradient becomes NaN and the others become 0.
"""

from rmsprop_jax.recipes._pytorch import torchvision_mobilenet_v3, wgan
from rmsprop_jax.recipes._reinforcement import a2c, dqn_zoo, impala, nature_dqn, torchbeast
from rmsprop_jax.recipes._vision import (
    efficientnet,
    inception,
    mobilenet_v2,
    mobilenet_v3,
)

__all__ = [
    "a2c",
    "dqn_zoo",
    "efficientnet",
    "impala",
    "inception",
    "mobilenet_v2",
    "mobilenet_v3",
    "nature_dqn",
    "torchbeast",
    "torchvision_mobilenet_v3",
    "wgan",
]

"""Published settings by name, each as its paper or its authors' code has it.

    from rmsprop_jax import recipes
    tx = recipes.nature_dqn()

Each is a dialect with its numbers and its schedule, chained with what belongs to the optimizer:
clipping of gradients, and weight decay where it is part of the loss. What does not (averages of
weights, clipped weights, how the loss is reduced) is said in the docstring, since a setting means
nothing without it.

Schedules count updates. Those of image models are given ``steps_per_epoch``, the number of
training images divided by the batch size; it need not be whole. What is added to or clipped of the
gradients before RMSProp is Optax's, with its limits: one infinite gradient and a clipped norm make
NaN of that gradient and 0 of the others.
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

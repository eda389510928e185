"""Optimizer state in 8 or 16 bits per element, and master weights for bfloat16 parameters.

    tx = rmsprop(1e-3, storage=low_memory.q8())

A storage can be passed to ``rmsprop``, ``scale_by_rms``, and every dialect and recipe. The
arithmetic is in float32 with each of them, and what is stored is rounded stochastically, so that
its mean is right. With rounding to nearest, an average would never move again once its steps are
smaller than half the distance between neighbouring numbers. No random key is stored: the random
bits are a hash of the seed, the step, the leaf's path and the position in the leaf. They are the
same eagerly, under ``jit``, in a loop, and for every sharding that ``jit`` supports.

========================  =======  ========  ==
bytes per parameter       float32  bfloat16  q8
========================  =======  ========  ==
second moment, variance   4        2         1
momentum                  4        2         1
mean, if centered         4        2         2
========================  =======  ========  ==

In both storages, a gradient that is not finite affects the update of its own element in its own
step as in float32. It never enters second moments and means, which only decay in that step, and a
NaN never enters momentum. Scalars, empty leaves and complex leaves are stored as without a storage,
and so are leaves of fewer than 4096 elements (``min_size``) with ``q8``. An update is
differentiable with respect to the gradient and the hyperparameters; what is stored is not.

Under ``jit``, the state is placed like the parameters. An update in bfloat16 needs no
communication. In 8 bits, the devices that share a leaf first agree on its largest code, a single
number. They do so inside ``pmap`` and ``shard_map``, too, over all mapped axes, so every device has
to take part in every step. There, the position in a leaf is the position in its shard: replicas
stay equal, and shards use the same random bits, which does no harm to any of them. To make shards
independent, name the mapped axes, as in ``q8(axis_name="data")``. Do not do so if a leaf is
replicated over them, since its copies would diverge.

Parameters in bfloat16 hardly move by themselves. With :func:`master_weights` they train like
float32 parameters, for 2, 1 or 0 additional bytes per parameter:

    tx = low_memory.master_weights(rmsprop(1e-3, storage=low_memory.q8()))

:func:`join_weights` returns them in float32, and :func:`split_weights` is its inverse.
"""

from rmsprop_jax.low_memory._join_weights import join_weights, split_weights
from rmsprop_jax.low_memory._master_weights import master_weights
from rmsprop_jax.low_memory._storages import bfloat16, q8

__all__ = ["bfloat16", "join_weights", "master_weights", "q8", "split_weights"]

"""Small state: how the slots of RMSProp are held in 8 or 16 bits a number, and parameters in 16.

    tx = rmsprop(1e-3, storage=low_memory.q8())

A storage goes to ``rmsprop``, ``scale_by_rms`` and every dialect and recipe. The arithmetic is in
float32 with either, and what is stored is rounded at random, so that its mean is right: rounded to
the nearest, an average whose steps are smaller than half the distance of its neighbours never
moves again. No random key is kept: the bits are a hash of the seed, the step, the leaf's path and
the place in the leaf, the same eagerly, compiled, in a loop and in whatever way ``jit`` shards.

    bytes a parameter        float32   bfloat16   q8
    second moment, variance  4         2          1
    momentum                 4         2          1
    mean, centered only      4         2          2

In both, a gradient that is not finite acts on its own coordinate in its own step as it does in
float32. It never enters second moments and means, which then only decay; of momentum, NaN never
does. Scalars, empty and complex leaves are held as without a storage, and so are, by q8, leaves
of fewer than 4096 elements (``min_size``). An update has its derivatives
by gradient and hyperparameters; what is stored has none.

Under ``jit``, what is stored is placed like the parameters. An update in bfloat16 needs no
communication; in 8 bits the devices that share a leaf agree on its largest code, a number, before
they step. So they do inside ``pmap`` and ``shard_map``, over all axes that are mapped: every device
has to take part in every step. There the place in a leaf is that in its shard: replicas stay equal,
and shards round by the same bits, which does no harm to any of them. To make them independent name
the mapped axes, ``q8(axis_name="data")``; not where a leaf is replicated over them, whose copies
would part.

Parameters in bfloat16 hardly move by themselves. With :func:`master_weights` they train like
float32, in 1 byte more, 2, or none:

    tx = low_memory.master_weights(rmsprop(1e-3, storage=low_memory.q8()))

:func:`join_weights` gives them in float32, and :func:`split_weights` takes them back.
"""

from rmsprop_jax.low_memory._join_weights import join_weights, split_weights
from rmsprop_jax.low_memory._master_weights import master_weights
from rmsprop_jax.low_memory._storages import bfloat16, q8

__all__ = ["bfloat16", "join_weights", "master_weights", "q8", "split_weights"]

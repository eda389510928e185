"""The shardings of a state, given those of its parameters."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

from rmsprop_jax._asking import ask
from rmsprop_jax._types import PyTree
from rmsprop_jax.sharding._arguments import check_axes, check_inside, checked, partition_of
from rmsprop_jax.sharding._placement import (
    check_divided,
    shardings_of_params,
    shardings_of_state,
)
from rmsprop_jax.sharding._zero1 import Zero1
from rmsprop_jax.sharding._zero1_mapped import Zero1Mapped


def state_sharding(
    tx: optax.GradientTransformation,
    params: optax.Params,
    shardings: PyTree,
    *,
    memory_kind: str | None = None,
) -> PyTree:
    """A sharding for each array of a state: its parameter's, if it belongs to one.

    For ``jax.jit(tx.init, out_shardings=...)``, ``jax.device_put``, the specs of ``jax.shard_map``
    and the target of a restore by Orbax. What belongs to no parameter, as the count of steps, is
    on every device.

    Args:
      tx: a transformation of this library, or any other, as ``optax.chain`` of several: the arrays
        of their states that have the path and shape of a parameter are placed like it, too. For
        :func:`zero1` and :func:`zero1_mapped` the state is split as they do.
      params: tree of parameters, of which only the structure, shapes and dtypes count: arrays or
        ``jax.ShapeDtypeStruct``.
      shardings: those of the parameters: a tree like params of ``jax.sharding.NamedSharding``, or a
        prefix of such a tree, as one for all.
      memory_kind: of what belongs to parameters, as "pinned_host" for the memory of the host; None
        for that of the parameters.

    Returns:
      A tree of shardings like the state.

    Raises:
      ValueError: if a sharding does not divide its parameter; if shardings is no prefix of params,
        on several meshes, or not that of zero1; if their mesh has no such axis as zero1_mapped; if
        one of these two is inside another wrapper, where it is not known which states are split.
      TypeError: if tx is no gradient transformation, or a sharding no NamedSharding.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from rmsprop_jax import rmsprop, sharding
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> params, tx = {"kernel": jnp.ones((16, 4))}, rmsprop(0.1)
      >>> placed = sharding.state_sharding(tx, params, NamedSharding(mesh, P("data")))
      >>> print(*placed.nu["kernel"].spec, *placed.count.spec)
      data
      >>> state = jax.jit(tx.init, out_shardings=placed)(params)
    """
    wrapper = partition_of(tx)
    inner = checked(tx if wrapper is None else wrapper.tx)
    wanted = shardings_of_params(shardings, params)
    meshes = {sharding.mesh for sharding in jax.tree.leaves(shardings)}
    if len(meshes) != 1:
        raise ValueError(f"shardings must be on one mesh, got {meshes or shardings}")
    everywhere = NamedSharding(meshes.pop(), PartitionSpec())

    if isinstance(wrapper, Zero1Mapped):
        check_axes("axis_name of zero1_mapped", wrapper.axes, everywhere.mesh)
        wanted = wrapper.parts(params, wanted)
        params = jax.tree.map(_part, params, wanted)
    inside, state = ask(inner.init, params)
    check_inside(inside)
    if isinstance(wrapper, Zero1):
        own = jax.tree.leaves(shardings_of_params(wrapper.shardings, params))
        for param, a, b in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), own, strict=True):
            if not a.is_equivalent_to(b, np.ndim(param)):
                raise ValueError(f"shardings must be those of zero1, {b}, got {a}")
        wanted = wrapper.parts(params)
    if not isinstance(wrapper, Zero1Mapped):
        check_divided(params, wanted)
    if memory_kind is not None:
        wanted = jax.tree.map(lambda sharding: sharding.with_memory_kind(memory_kind), wanted)
    return shardings_of_state(state, params, wanted, everywhere)


def _part(param: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """What a device has of a parameter."""
    shape = sharding.shard_shape(np.shape(param))
    return jax.ShapeDtypeStruct(shape, jax.numpy.result_type(param))

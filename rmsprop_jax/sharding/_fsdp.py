"""Fully sharded data parallelism: a part of each parameter on each device."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from rmsprop_jax._checks import integer
from rmsprop_jax._types import PyTree
from rmsprop_jax.sharding._arguments import AxisName, axes_of, check_axes, check_mesh
from rmsprop_jax.sharding._placement import split_over


def fsdp_shardings(
    params: optax.Params, mesh: Mesh | AbstractMesh, axis: AxisName, *, min_size: int = 4096
) -> PyTree:
    """Shardings that split each parameter over an axis of a mesh, as FSDP (ZeRO stage 3) does.

    Each parameter is split along its first axis that is divisible by the number of devices. With
    several mesh axes, it is split along one or more of its own axes, whichever leaves the least per
    device, and over only those mesh axes that divide it. Parameters cannot be padded, as
    :func:`zero1` does with their state: on 12 devices a (4096, 4096) kernel stays replicated, but
    on a mesh of 4 times 3, given both axes, it is split in 4.

    Args:
      params: tree of parameters, of which only the structure and shapes matter: arrays or
        ``jax.ShapeDtypeStruct``.
      mesh: mesh of devices, or a ``jax.sharding.AbstractMesh``.
      axis: name of the mesh axis, or a tuple of names.
      min_size: parameters of fewer elements stay replicated, since every parameter that is split
        has to be gathered before use.

    Returns:
      A tree like params of ``jax.sharding.NamedSharding``, for ``jax.device_put``, the
      ``out_shardings`` of ``jax.jit`` and :func:`state_sharding`.

    Raises:
      ValueError: if the mesh has no such axis, or min_size is below 0.
      TypeError: if mesh is not a mesh, axis not a name, or min_size not an integer.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import sharding
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> params = {"kernel": jnp.ones((128, 64)), "bias": jnp.ones(64)}
      >>> where = sharding.fsdp_shardings(params, mesh, "data")
      >>> params = jax.device_put(params, where)
      >>> where["kernel"].shard_shape((128, 64)) == (128 // mesh.size, 64)
      True
      >>> where["bias"].is_fully_replicated
      True

    Sources: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
    models", arXiv:1910.02054, 2019 (stage 3); Zhao et al., "PyTorch FSDP: experiences on scaling
    fully sharded data parallel", arXiv:2304.11277, 2023.
    """
    check_mesh(mesh)
    axes = axes_of("axis", axis)
    check_axes("axis", axes, mesh)
    min_size = integer("min_size", min_size, 0)
    whole = NamedSharding(mesh, PartitionSpec())

    def place(param: Any) -> NamedSharding:
        if math.prod(np.shape(param)) < min_size:
            return whole
        return split_over(axes, param, whole, pad=False)

    return jax.tree.map(place, params)

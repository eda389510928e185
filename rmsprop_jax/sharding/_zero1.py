"""ZeRO stage 1 under jit: each device holds and updates its part of the state."""

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import optax

from rmsprop_jax._asking import ask, is_asked
from rmsprop_jax._gradients import without_float0
from rmsprop_jax._transformation import transformation
from rmsprop_jax._types import PyTree
from rmsprop_jax.sharding._arguments import (
    Partition,
    axes_of,
    check_axes,
    check_inside,
    check_shardings,
    checked,
)
from rmsprop_jax.sharding._placement import (
    check_divided,
    partition_over,
    placed,
    shardings_of_params,
    shardings_of_state,
)

AxisName = str | tuple[str, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zero1(Partition):
    """What is wrapped, and where; its methods are the two functions of a transformation."""

    tx: optax.GradientTransformation
    axes: tuple[str, ...]
    shardings: PyTree  # of the parameters, or a prefix of them
    everywhere: NamedSharding

    def init(self, params: optax.Params) -> optax.OptState:
        if is_asked():
            return self.tx.init(params)
        check_inside(ask(self.tx.init, params)[0])
        parts = self.parts(params)
        state = self.tx.init(placed(params, parts))
        check_divided(params, parts)
        wanted = shardings_of_state(state, params, parts, self.everywhere)
        return placed(state, wanted)

    def update(
        self,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates = without_float0(updates)
        like = updates if params is None else params
        parts = self.parts(like)
        if params is not None:
            params = placed(params, parts)
        updates = placed(updates, parts)
        updates, state = self.tx.update(updates, state, params, **extra_args)
        # Where a gradient of None is all that is left of a parameter, its state belongs to none.
        left_out = any(leaf is None for leaf in jax.tree.leaves(like, is_leaf=lambda x: x is None))
        others = None if left_out else self.everywhere
        state = placed(state, shardings_of_state(state, like, parts, others))
        return placed(updates, shardings_of_params(self.shardings, updates)), state

    def parts(self, params: optax.Params) -> PyTree:
        """The shardings of the parts of the parameters, of which each device has the state."""
        whole = shardings_of_params(self.shardings, params)
        return partition_over(self.axes, params, whole)


def zero1(
    tx: optax.GradientTransformation, mesh: Mesh, axis: AxisName, shardings: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation with its state split over an axis of a mesh; parameters stay whole.

    The gradients are split as the state is, by a reduce-scatter, or an all-reduce of which each
    device takes its part; the updates are gathered. The steps are those of tx, whatever is in it:
    under ``jit`` a norm or a mean is of the whole array, however that is split.

    Each parameter is split along its first axis that the number of devices divides. One that has no
    such axis is not split, nor its state.

    Args:
      tx: a transformation of this library, or any other; also ``optax.chain`` of several.
      mesh: of devices; its axes are all ``Auto`` or all ``Explicit``.
      axis: the axis, or a tuple of axes, over which data are sharded and parameters are not.
      shardings: where the parameters are sharded over other axes of the mesh, a tree like them of
        ``jax.sharding.NamedSharding``, or a prefix of such a tree; None if every device holds all.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``init`` and ``update`` work under ``jit``
      and eagerly, and whose state is that of tx.

    Raises:
      ValueError: if the mesh has no such axis, or axes of other types; if shardings are on another;
        if tx has zero1 or zero1_mapped in it.
      TypeError: if tx is no gradient transformation, mesh no Mesh, axis no name, or a sharding no
        NamedSharding.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from rmsprop_jax import rmsprop, sharding
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> params = jax.device_put({"kernel": jnp.ones((16, 4))}, NamedSharding(mesh, P()))
      >>> tx = sharding.zero1(rmsprop(0.1), mesh, "data")
      >>> state = jax.jit(tx.init)(params)
      >>> updates, state = jax.jit(tx.update)(params, state)
      >>> state.nu["kernel"].sharding.shard_shape((16, 4)) == (16 // mesh.size, 4)
      True
      >>> updates["kernel"].sharding.is_fully_replicated
      True

    Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
    models", arXiv:1910.02054, 2019.
    """
    tx = checked(tx)
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    axes = axes_of("axis", axis)
    check_axes("axis", axes, mesh)
    if set(mesh.axis_types) not in ({AxisType.Auto}, {AxisType.Explicit}):
        raise ValueError(
            f"mesh must have axes that are all Auto or all Explicit, got {mesh.axis_types}"
        )
    everywhere = NamedSharding(mesh, PartitionSpec())
    check_shardings(shardings)
    for sharding in jax.tree.leaves(shardings):
        if sharding.mesh != mesh:
            raise ValueError(f"shardings must be on the mesh {mesh}, got {sharding}")
    return transformation(
        Zero1(tx, axes, everywhere if shardings is None else shardings, everywhere)
    )

"""ZeRO stage 1 under jit: each device holds and updates its part of the state."""

import dataclasses
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import optax

from rmsprop_jax._asking import ask, is_asked
from rmsprop_jax._gradients import without_float0
from rmsprop_jax._leaves import is_none
from rmsprop_jax._transformation import transformation
from rmsprop_jax._types import PyTree
from rmsprop_jax.sharding._arguments import (
    AxisName,
    Partition,
    axes_of,
    check_axes,
    check_context,
    check_gradients,
    check_inside,
    check_mesh,
    check_shardings,
    checked,
)
from rmsprop_jax.sharding._owners import strays, warn_of
from rmsprop_jax.sharding._placement import (
    all_even,
    check_divided,
    filled,
    inside_auto,
    placed,
    shardings_of_params,
    shardings_of_state,
    split_over,
    unfilled,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zero1(Partition):
    """The wrapped transformation and its placement. Has the two functions of the wrapper."""

    tx: optax.GradientTransformation
    axes: tuple[str, ...]
    shardings: PyTree  # those of the parameters, or a prefix of that tree
    everywhere: NamedSharding

    def init(self, params: optax.Params) -> optax.OptState:
        if is_asked():
            return self.tx.init(params)
        check_context(self.everywhere.mesh, self.axes, params)
        inside, state = ask(self.tx.init, params)
        check_inside(inside)
        check_divided(params, self.whole(params))
        parts = self.parts(params)
        warn_of(strays(state, params, parts))
        wanted = shardings_of_state(state, params, parts, self.everywhere)

        def init(params: optax.Params) -> optax.OptState:
            return filled(self.tx.init(placed(params, parts)), wanted)

        return inside_auto(init, (params,), wanted) if self.explicit else init(params)

    def update(
        self,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_context(self.everywhere.mesh, self.axes, updates)
        updates = without_float0(updates)
        like = updates if params is None else params
        check_gradients(updates, like)
        parts = self.parts(like)
        # If all that is left of a parameter is a gradient of None, its state belongs to none.
        left_out = any(leaf is None for leaf in jax.tree.leaves(like, is_leaf=is_none))
        others = None if left_out else self.everywhere

        def update(
            updates: optax.Updates,
            state: optax.OptState,
            params: optax.Params | None,
            extra_args: dict[str, Any],
        ) -> tuple[optax.Updates, optax.OptState]:
            if not even:
                state = unfilled(state, like, parts)
            if params is not None:
                params = placed(params, parts)
            updates = placed(updates, parts)
            updates, state = self.tx.update(updates, state, params, **extra_args)
            state = filled(state, shardings_of_state(state, like, parts, others))
            return placed(updates, self.whole(updates)), state

        even, given = all_even(parts, like), (updates, state, params, extra_args)
        if not self.explicit:
            return update(*given)
        wanted = shardings_of_state(state, like, parts, others)
        if others is None:  # the others stay where they are
            own = jax.tree.map(lambda x: jax.typeof(x).sharding, state)
            wanted = jax.tree.map(lambda sharding, x: sharding or x, wanted, own, is_leaf=is_none)
        return inside_auto(update, given, (self.whole(updates), wanted))

    @property
    def explicit(self) -> bool:
        """Whether the axes of the mesh are Explicit."""
        return AxisType.Explicit in self.everywhere.mesh.axis_types

    def whole(self, params: optax.Params) -> PyTree:
        """The shardings of the parameters."""
        return shardings_of_params(self.shardings, params)

    def parts(self, params: optax.Params) -> PyTree:
        """The shardings of the parts of the parameters whose state each device has."""
        return split_over(self.axes, params, self.whole(params), pad=True)


def zero1(
    tx: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    axis: AxisName,
    shardings: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """Splits the state of tx over an axis of a mesh (ZeRO stage 1); parameters stay replicated.

    The gradients are split like the state, by a reduce-scatter, or by an all-reduce of which each
    device takes its part; the updates are gathered. The steps are those of tx, whatever it
    contains: under ``jit``, a norm or a mean is that of the whole array, however it is split.

    Each parameter is split along its first axis that is divisible by the number of devices, or,
    over several axes of the mesh, along several of its own. A parameter that cannot be divided
    evenly and has 128 elements or more is split along the axis that leaves the least per device.
    The arrays of its state are padded with zeros to a multiple of the number of devices between
    steps; tx sees them in the shape of the parameter. The gradient of such a parameter takes an
    all-reduce. A smaller parameter stays replicated, and so does its state.

    To continue with the state of another number of devices, use :func:`move_state`.

    Args:
      tx: a transformation of this library, or any other; also ``optax.chain`` of several.
      mesh: mesh of devices, whose axes are all ``Auto`` or all ``Explicit``. A
        ``jax.sharding.AbstractMesh`` is enough for :func:`state_sharding` and :func:`report`.
      axis: the axis, or a tuple of axes, over which data are sharded and parameters are not.
      shardings: if the parameters are sharded over other axes of the mesh, a tree like them of
        ``jax.sharding.NamedSharding``, or a prefix of such a tree. None if they are replicated.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``init`` and ``update`` work under ``jit``
      and eagerly, and whose state is that of tx. Eagerly, padded arrays are replicated during the
      update.

    Raises:
      ValueError: if the mesh has no such axis, or axes of other types; if shardings are on another
        mesh; if tx contains zero1 or zero1_mapped. In ``update``, if gradients are in another tree
        than params, as those of ``optax.lookahead`` are; put zero1 inside lookahead.
      TypeError: if tx is not a gradient transformation, mesh not a Mesh, axis not a name, or a
        sharding not a NamedSharding.

    Warns:
      UserWarning: in ``init``, as :func:`state_sharding`.

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
    check_mesh(mesh)
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

"""Where the arrays of a state belong, given the shardings of its parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, tree_leaves_with_path
import numpy as np
import optax

from rmsprop_jax._asking import ask
from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._types import PyTree
from rmsprop_jax.sharding._arguments import check_axes, check_inside, checked, partition_of
from rmsprop_jax.sharding._division import part_of, whole_of
from rmsprop_jax.sharding._owners import owners, strays, warn_of
from rmsprop_jax.sharding._placement import check_divided, resized, shardings_of_params
from rmsprop_jax.sharding._zero1 import Zero1
from rmsprop_jax.sharding._zero1_mapped import Zero1Mapped


class Place(NamedTuple):
    """The owner and the placement of one array of a state.

    Attributes:
      part: shape of the part that a device has, padded if necessary.
      dtype: its dtype.
      sharding: the sharding of the whole array.
      owner: the index of the parameter that it belongs to, or None.
      stray: whether it has no owner, but looks as if it should.
    """

    part: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding
    owner: int | None
    stray: bool


def places(tx: optax.GradientTransformation, params: optax.Params, shardings: PyTree) -> PyTree:
    """A Place for each array of a state of tx, in a tree like the state."""
    wrapper = partition_of(tx)
    inner = checked(tx if wrapper is None else wrapper.tx)
    wanted = shardings_of_params(shardings, params)
    meshes = {sharding.mesh for sharding in jax.tree.leaves(shardings)}
    if len(meshes) != 1:
        raise ValueError(f"shardings must be on one mesh, got {meshes or shardings}")
    everywhere = NamedSharding(meshes.pop(), PartitionSpec())

    if isinstance(wrapper, Zero1):
        own = jax.tree.leaves(wrapper.whole(params))
        for param, a, b in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), own, strict=True):
            if a != b and not a.is_equivalent_to(b, np.ndim(param)):
                raise ValueError(f"shardings must be those of zero1, {b}, got {a}")
    check_divided(params, wanted)
    if isinstance(wrapper, Zero1):
        wanted = wrapper.parts(params)
    if isinstance(wrapper, Zero1Mapped):
        check_axes("axis_name of zero1_mapped", wrapper.axes, everywhere.mesh)
        wanted = wrapper.parts(params, wanted)
        params = jax.tree.map(_part, params, wanted)
    inside, state = ask(inner.init, params)
    check_inside(inside)

    other = {*strays(state, params, wanted)}
    of_params, found = jax.tree.leaves(wanted), []
    arrays = tree_leaves_with_path(state)
    for (path, array), owner in zip(arrays, owners(state, params, wanted), strict=True):
        sharding = everywhere if owner is None else of_params[owner]
        is_part = isinstance(wrapper, Zero1Mapped)
        part = np.shape(array) if is_part else part_of(sharding, np.shape(array))
        stray = leaf_name(path) in other
        found.append(Place(part, jnp.result_type(array), sharding, owner, stray))
    return jax.tree.unflatten(jax.tree.structure(state), found)


def is_place(node: Any) -> bool:
    return isinstance(node, Place)


def names_of_strays(found: PyTree) -> list[str]:
    leaves = tree_leaves_with_path(found, is_leaf=is_place)
    return [leaf_name(path) for path, place in leaves if place.stray]


def state_sharding(
    tx: optax.GradientTransformation,
    params: optax.Params,
    shardings: PyTree,
    *,
    memory_kind: str | None = None,
) -> PyTree:
    """Returns the sharding of each array of a state: that of its parameter, if it has one.

    Use it for ``jax.jit(tx.init, out_shardings=...)``, ``jax.device_put``, the specs of
    ``jax.shard_map`` and the target of an Orbax restore. Arrays that belong to no parameter, such
    as the step count, are replicated.

    Args:
      tx: a transformation of this library, or any other, such as ``optax.chain`` of several: arrays
        in their states that have the path and shape of a parameter are placed like it, too. For
        :func:`zero1` and :func:`zero1_mapped`, the state is split and padded as they do.
      params: tree of parameters, of which only the structure, shapes and dtypes matter: arrays or
        ``jax.ShapeDtypeStruct``.
      shardings: those of the parameters: a tree like params of ``jax.sharding.NamedSharding``, or a
        prefix of such a tree, such as a single one for all.
      memory_kind: memory kind of the arrays that belong to parameters, such as "pinned_host" for
        host memory; None for that of the parameters.

    Returns:
      A tree of shardings like the state.

    Raises:
      ValueError: if a sharding does not divide its parameter; if shardings is not a prefix of
        params, is on several meshes, or is not that of zero1; if their mesh lacks the axis of
        zero1_mapped; if zero1 or zero1_mapped is inside another wrapper, where it is not known
        which states are split.
      TypeError: if tx is not a gradient transformation, or a sharding not a NamedSharding.

    Warns:
      UserWarning: if arrays of the state have the shape of a parameter, but not its path, and will
        therefore be replicated. This is so for all arrays in ``optax.lookahead``, whose parameters
        are pairs.

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

    def sharding_of(place: Place) -> NamedSharding:
        if memory_kind is None or place.owner is None:
            return place.sharding
        return place.sharding.with_memory_kind(memory_kind)

    found = places(tx, params, shardings)
    warn_of(names_of_strays(found))
    return jax.tree.map(sharding_of, found, is_leaf=is_place)


def move_state(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params, shardings: PyTree
) -> optax.OptState:
    """Converts a state from another number of devices, or another way of splitting it.

    Which arrays :func:`zero1` and :func:`zero1_mapped` pad with zeros, and how far, depends on the
    number of devices. This function cuts or pads them, and places them as :func:`state_sharding`
    says. To get the state for one device, for instance for a conversion, pass a tx without zero1
    and zero1_mapped. Arrays that change their shapes go through host memory, one at a time.

    Orbax can do the same when it reads a file: ``restore(path, target, strict=False)``, with a
    target that has the shapes of ``jax.eval_shape(tx.init, params)`` and the shardings of
    :func:`state_sharding`.

    Args:
      tx: the transformation that is to continue.
      state: that of the same transformation, with zero1, zero1_mapped or neither. This process must
        have its arrays as a whole.
      params: as for :func:`state_sharding`.
      shardings: as for :func:`state_sharding`.

    Returns:
      The state for tx.

    Raises:
      ValueError: if state does not belong to tx and params; and as in :func:`state_sharding`.
      TypeError: as in :func:`state_sharding`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> from rmsprop_jax import rmsprop, sharding
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> params, tx, whole = jnp.ones((15, 13)), rmsprop(0.1), NamedSharding(mesh, P())
      >>> on_all = sharding.zero1(tx, mesh, "data")
      >>> state = sharding.move_state(on_all, tx.init(params), params, whole)
      >>> sharding.move_state(tx, state, params, whole).nu.shape
      (15, 13)
    """
    found = places(tx, params, shardings)
    warn_of(names_of_strays(found))
    wanted: Any = jax.tree.structure(found, is_leaf=is_place)
    got: Any = jax.tree.structure(state)
    if wanted != got:
        raise ValueError(f"state must be one of tx for params, {wanted}, got {got}")
    shapes = [np.shape(param) for param in jax.tree.leaves(params)]

    def moved(path: KeyPath, place: Place, array: Any) -> Any:
        shape = whole_of(place.sharding, place.part)
        least = shape if place.owner is None else shapes[place.owner]
        enough = np.ndim(array) == len(least) and all(
            had >= size for had, size in zip(np.shape(array), least, strict=True)
        )
        if not enough or (place.owner is None and np.shape(array) != shape):
            raise ValueError(
                f"state must be one of tx for params, of shape {least} in {leaf_name(path)!r}, "
                f"got {np.shape(array)}"
            )
        if np.shape(array) != shape:
            array = resized(np.asarray(array), shape)
        return jax.device_put(array, place.sharding)

    return jax.tree_util.tree_map_with_path(moved, found, state, is_leaf=is_place)


def _part(param: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a device's part of a parameter."""
    shape = part_of(sharding, np.shape(param))
    return jax.ShapeDtypeStruct(shape, jnp.result_type(param))

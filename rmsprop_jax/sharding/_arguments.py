"""What a caller may pass to these functions; anything else is refused by name."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import optax

from rmsprop_jax._asking import Part, ask_without_params
from rmsprop_jax._leaves import is_none, leaf_name
from rmsprop_jax._transformation import Transformation
from rmsprop_jax._types import PyTree

AxisName = str | tuple[str, ...]


class Partition:
    """A wrapper that gives each device a part of the state of tx: zero1 or zero1_mapped."""

    tx: optax.GradientTransformation
    axes: tuple[str, ...]


def partition_of(tx: optax.GradientTransformation) -> Partition | None:
    """The wrapper that made tx, if that is zero1 or zero1_mapped."""
    part = tx.part if isinstance(tx, Transformation) else None
    return part if isinstance(part, Partition) else None


def checked(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """tx, with an update that takes extra arguments; refused if it is partitioned already."""
    if not callable(getattr(tx, "init", None)) or not callable(getattr(tx, "update", None)):
        raise TypeError(f"tx must be a gradient transformation, got {tx!r}")
    check_inside(ask_without_params(tx.init) or [])  # init knows the parameters, and asks again
    # optax.MultiSteps is not a GradientTransformation, and takes extra arguments.
    plain = isinstance(tx, optax.GradientTransformation)
    return optax.with_extra_args_support(tx) if plain else tx


def check_inside(parts: Sequence[Part]) -> None:
    """Refuses partitioned parts inside a transformation."""
    if any(isinstance(part, Partition) for part in parts):
        raise ValueError(
            "tx must not have zero1 or zero1_mapped inside it: put them outside, as in "
            "zero1(optax.chain(...), mesh, axis)"
        )


def axes_of(name: str, value: Any) -> tuple[str, ...]:
    """A name, or a tuple of distinct names, as a tuple."""
    axes = value if isinstance(value, tuple) else (value,)
    if not axes or not all(isinstance(axis, str) for axis in axes) or len({*axes}) < len(axes):
        raise TypeError(f"{name} must be a name or a tuple of different names, got {value!r}")
    return axes


def check_mesh(mesh: Any) -> None:
    """Refuses anything but a mesh, with or without devices."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")


def check_axes(name: str, axes: Sequence[str], mesh: Any) -> None:
    """Refuses axes that a mesh does not have."""
    if any(axis not in mesh.axis_names for axis in axes):
        raise ValueError(
            f"{name} must be of the mesh, whose axes are {mesh.axis_names}, got {axes}"
        )


def check_context(mesh: Mesh | AbstractMesh, axes: Sequence[str], tree: PyTree) -> None:
    """Refuses to split a tree if the program is mapped over these axes, or is on another mesh."""
    context = jax.sharding.get_abstract_mesh()
    if context.empty:
        return
    if any(axis in context.manual_axes for axis in axes):
        raise ValueError(
            f"zero1 must not split over {axes} inside jax.shard_map over {context.manual_axes}: "
            "use zero1_mapped there"
        )
    fits = context.axis_names == mesh.axis_names and context.axis_sizes == mesh.axis_sizes
    kinds = set(context.axis_types) - {AxisType.Manual}
    if AxisType.Explicit in mesh.axis_types:
        typed = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)]
        inside_auto_axes = any(AxisType.Auto in one.axis_types for one in typed)
        wanted = AxisType.Auto if inside_auto_axes else AxisType.Explicit
        fits = fits and kinds == {wanted} and not context.manual_axes
    else:
        fits = fits and kinds == {AxisType.Auto}
    if not fits:
        raise ValueError(
            f"zero1 was made for the mesh {_in_words(mesh)}, and must not be used on another, got "
            f"{_in_words(context)} from jax.set_mesh or jax.shard_map"
        )


def check_not_explicit(tree: PyTree) -> None:
    """Refuses arrays that are split over Explicit axes that shard_map leaves out."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        spec = getattr(jax.typeof(x).sharding, "spec", ())
        if any(names is not None for names in spec):
            raise ValueError(
                "zero1_mapped needs Auto axes where jax.shard_map leaves axes of the mesh out, "
                f"got {leaf_name(path)!r} split over an Explicit one, {spec}"
            )


def _in_words(mesh: Any) -> str:
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return ", ".join(f"{name!r} of {size} ({kind.name})" for name, size, kind in axes)


def check_gradients(grads: optax.Updates, params: optax.Params) -> None:
    """Refuses gradients in another tree than the parameters; some may be None."""
    structure: Any = jax.tree.structure(params, is_leaf=is_none)
    try:
        structure.flatten_up_to(grads)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"gradients must be in a tree like params, {structure}, got "
            f"{jax.tree.structure(grads)}. If tx is optax.lookahead, whose parameters are pairs, "
            "put zero1 or zero1_mapped inside: optax.lookahead(zero1(...), ...)"
        ) from error


def check_shardings(shardings: PyTree) -> None:
    """Refuses leaves other than NamedShardings that define the placement completely."""
    for sharding in jax.tree.leaves(shardings):
        if not isinstance(sharding, NamedSharding):
            raise TypeError(f"shardings must be of jax.sharding.NamedSharding, got {sharding!r}")
        if PartitionSpec.UNCONSTRAINED in sharding.spec:
            raise ValueError(f"shardings must not be unconstrained, got {sharding}")

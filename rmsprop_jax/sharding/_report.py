"""How much of the parameters and state each device holds, computed before any arrays exist."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.tree_util import tree_leaves_with_path
import numpy as np
import optax

from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._types import PyTree
from rmsprop_jax.sharding._arguments import partition_of
from rmsprop_jax.sharding._division import WORTH_PADDING, Shape, division, part_of
from rmsprop_jax.sharding._placement import shardings_of_params
from rmsprop_jax.sharding._state import is_place, places


class Whole(NamedTuple):
    """State that every device holds as a whole.

    Attributes:
      name: of the parameter that the state belongs to, such as "layer/kernel"; or, in the state, of
        an array that belongs to no parameter, but has the shape of one.
      shape: its shape.
      state_bytes: bytes of its state on each device.
      reason: why it is not split.
    """

    name: str
    shape: tuple[int, ...]
    state_bytes: int
    reason: str


class Report(NamedTuple):
    """The result of :func:`report`: bytes on one device, the same on all devices.

    Attributes:
      devices: number of devices.
      params: bytes of the parameters.
      state: bytes of the state.
      all_params: bytes of the parameters on a single device that holds all of them.
      all_state: bytes of the state on such a device.
      whole: what parts of the state are not split, the largest first.
    """

    devices: int
    params: int
    state: int
    all_params: int
    all_state: int
    whole: tuple[Whole, ...]

    def __str__(self) -> str:
        def row(name: str, everything: int, held: int) -> str:
            shares = held * self.devices / everything if everything else 1.0
            return f"{name:10} {everything:>19,} {held:>19,} {shares:>13.3f}"

        lines = [
            f"{'bytes':10} {'in all':>19} {f'on each of {self.devices}':>19} {'equal shares':>13}",
            row("parameters", self.all_params, self.params),
            row("state", self.all_state, self.state),
        ]
        if self.whole:
            lines += ["", "state that is whole on each device"]
            lines += [
                f"{one.name:20} {one.shape!s:>20} {one.state_bytes:>13,}  {one.reason}"
                for one in self.whole
            ]
        return "\n".join(lines)


def report(tx: optax.GradientTransformation, params: optax.Params, shardings: PyTree) -> Report:
    """Reports the bytes of parameters and state on each device, and which state is not split.

    No arrays are created and nothing is compiled. So it works for parameters that fit on no device,
    and, with a ``jax.sharding.AbstractMesh``, for more devices than there are. Gradients, updates
    and whatever else exists during a step are not counted.

    Args:
      tx: a transformation, as for :func:`state_sharding`; also that of :func:`zero1` or
        :func:`zero1_mapped`.
      params: tree of parameters, of which only the structure, shapes and dtypes matter: arrays or
        ``jax.ShapeDtypeStruct``.
      shardings: those of the parameters, or a prefix of that tree.

    Returns:
      A :class:`Report`, whose ``str`` is a table. Its column "equal shares" is what a device holds,
      divided by an equal share of everything: 1 if all is split evenly, the number of devices if
      nothing is split.

    Raises:
      ValueError, TypeError: as in :func:`state_sharding`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P
      >>> from rmsprop_jax import rmsprop, sharding
      >>> mesh = AbstractMesh((12,), ("data",))
      >>> shapes = {"kernel": (4096, 4096), "bias": (4096,), "scale": ()}
      >>> params = {name: jax.ShapeDtypeStruct(s, jnp.bfloat16) for name, s in shapes.items()}
      >>> tx = sharding.zero1(rmsprop(0.1, momentum=0.9), mesh, "data")
      >>> print(sharding.report(tx, params, NamedSharding(mesh, P())))
      bytes                   in all       on each of 12  equal shares
      parameters          33,562,626          33,562,626        12.000
      state              134,250,508          11,209,404         1.002
      <BLANKLINE>
      state that is whole on each device
      scale                                  ()             8  is a scalar
    """
    found = tree_leaves_with_path(places(tx, params, shardings), is_leaf=is_place)
    wanted = jax.tree.leaves(shardings_of_params(shardings, params))
    mesh = wanted[0].mesh
    leaves = [(leaf_name(path), np.shape(p), p) for path, p in tree_leaves_with_path(params)]
    held, all_params = 0, 0
    for sharding, (_, shape, param) in zip(wanted, leaves, strict=True):
        held += _bytes(part_of(sharding, shape), jnp.result_type(param))
        all_params += _bytes(shape, jnp.result_type(param))

    all_state, whole = 0, dict[str | int, Whole]()
    for path, (part, dtype, sharding, owner, stray) in found:
        name, shape = (leaf_name(path), part) if owner is None else leaves[owner][:2]
        all_state += _bytes(shape, dtype)
        if part == shape and 0 not in shape and mesh.size > 1 and (stray or owner is not None):
            key = name if owner is None else owner
            before = whole[key].state_bytes if key in whole else 0
            reason = _STRAY if stray else _reason(tx, shape, sharding)
            whole[key] = Whole(name, shape, before + _bytes(part, dtype), reason)
    state = sum(_bytes(place.part, place.dtype) for _, place in found)
    largest_first = sorted(whole.values(), key=lambda one: -one.state_bytes)
    return Report(mesh.size, held, state, all_params, all_state, tuple(largest_first))


_STRAY = "belongs to no parameter, though it has the shape of one"


def _reason(tx: optax.GradientTransformation, shape: Shape, sharding: NamedSharding) -> str:
    """Why the state of a parameter is not split."""
    if shape == ():
        return "is a scalar"
    sizes = sharding.mesh.shape
    if (wrapper := partition_of(tx)) is not None:
        sizes = {name: sizes[name] for name in wrapper.axes}
    n = math.prod(sizes.values())
    if n == 1 or any(division(shape, sizes, pad=wrapper is not None)):
        return f"has the sharding {sharding.spec}"
    if wrapper is None:
        return f"has the sharding {sharding.spec}, and no axis that {n} devices divide"
    return f"has no axis that {n} devices divide, and fewer than {WORTH_PADDING} elements"


def _bytes(shape: Shape, dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize

"""ZeRO stage 1 inside a mapped axis, of pmap or shard_map."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from rmsprop_jax._asking import Part, ask, ask_without_params, is_asked
from rmsprop_jax._gradients import without_float0
from rmsprop_jax._mapped import varies_over
from rmsprop_jax._rule import some_rules
from rmsprop_jax._transformation import transformation
from rmsprop_jax._types import PyTree
from rmsprop_jax.sharding._arguments import (
    AxisName,
    Partition,
    axes_of,
    check_gradients,
    check_inside,
    check_not_explicit,
    checked,
)
from rmsprop_jax.sharding._beyond import update_of_parts
from rmsprop_jax.sharding._division import Division, division
from rmsprop_jax.sharding._placement import resized, split_over


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Zero1Mapped(Partition):
    """The wrapped transformation and its axes. Has the two functions of the wrapper."""

    tx: optax.GradientTransformation
    axes: tuple[str, ...]

    def init(self, params: optax.Params) -> optax.OptState:
        if is_asked():
            return self.tx.init(params)
        check_not_explicit(params)
        params = jax.tree.map(self._mine, params)
        self.check(ask(self.tx.init, params)[0])
        return self.tx.init(params)

    def check(self, parts: Sequence[Part]) -> None:
        """Refuses those parts of tx that do not work on parts of leaves."""
        check_inside(parts)
        for rule in some_rules(self.tx, parts):
            if rule.variant.cautious:
                raise ValueError(
                    "tx must not be cautious, which takes a mean over each leaf, while "
                    "zero1_mapped gives it parts of leaves: use zero1"
                )
            if getattr(rule.variant.storage, "axis_name", None) is not None:
                raise ValueError(
                    "the storage of tx must not have an axis_name: leaves that zero1_mapped does "
                    "not split would be rounded differently on each device"
                )

    def update(
        self,
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if varies_over(lax.axis_index(self.axes)):
            raise ValueError(
                "zero1_mapped needs jax.shard_map(..., check_vma=False): with check_vma=True, "
                "jax.grad sums the gradients of replicated parameters over the devices before "
                "zero1_mapped takes their mean"
            )
        updates = whole = without_float0(updates)
        check_not_explicit((updates, params))
        if params is not None:
            check_gradients(updates, params)
        is_split = [jax.tree.map(lambda x: any(self._division(x)), x) for x in (whole, params)]
        params = jax.tree.map(self._mine, params)
        updates = jax.tree.map(self._mean, updates)
        self.check(ask(self.tx.init, updates if params is None else params)[0])
        updates, state = update_of_parts(
            functools.partial(self.tx.update, **extra_args),
            (updates, state, params),
            (is_split[0], is_like(updates, is_split[0], state), is_split[1]),
            self.axes,
        )
        return jax.tree.map(self._gathered, updates, whole), state

    def parts(self, params: optax.Params, shardings: PyTree) -> PyTree:
        """The shardings of the parts of the parameters whose state each device has."""
        return split_over(self.axes, params, shardings, pad=True)

    def _division(self, x: Any) -> Division:
        sizes = {name: lax.axis_size(name) for name in self.axes}
        return division(jnp.shape(x), sizes, pad=True)

    def _mine(self, x: Any) -> Any:
        """The part of a parameter that belongs to this device."""
        for axis, names in enumerate(self._division(x)):
            if names:
                x = _filled(x, axis, names)
                size = x.shape[axis] // lax.axis_size(names)
                x = lax.dynamic_slice_in_dim(x, lax.axis_index(names) * size, size, axis)
        return x

    def _mean(self, g: Any) -> Any:
        """The part of the mean gradient over all devices that belongs to this device."""
        n, parted = lax.axis_size(self.axes), self._division(g)
        if n == 1:  # XLA does not notice that nothing has to be done
            return g
        first = g.dtype == jnp.float16  # a sum may be beyond its range
        g = g / n if first else g
        if not any(parted):
            g = lax.psum(g, self.axes)
        for axis, names in enumerate(parted):
            if names:
                g = _filled(g, axis, names)
                g = lax.psum_scatter(g, names, scatter_dimension=axis, tiled=True)
        return g if first else g / n

    def _gathered(self, u: Any, whole: Any) -> Any:
        """The whole update, from the parts of all devices."""
        for axis, names in enumerate(self._division(whole)):
            if names:
                u = lax.all_gather(u, names, axis=axis, tiled=True)
                u = lax.slice_in_dim(u, 0, whole.shape[axis], axis=axis)
        return u


def _filled(x: jax.Array, axis: int, names: tuple[str, ...]) -> jax.Array:
    """An array padded with zeros along an axis, so that the devices divide it."""
    n, shape = lax.axis_size(names), list(x.shape)
    shape[axis] = -(-shape[axis] // n) * n
    return resized(x, tuple(shape))


def is_like(updates: optax.Updates, is_part: PyTree, state: optax.OptState) -> PyTree:
    """For each array of a state, whether it has the shape of a part."""
    each = zip(jax.tree.leaves(updates), jax.tree.leaves(is_part), strict=True)
    shapes = {jnp.shape(part) for part, split in each if split}
    return jax.tree.map(lambda x: jnp.shape(x) in shapes, state)


def zero1_mapped(
    tx: optax.GradientTransformation, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """Splits the state of tx over the devices of a mapped axis (ZeRO stage 1).

    Use it inside ``jax.pmap`` and ``jax.shard_map``, where each device has all parameters and the
    gradients of its own data. ``update`` takes the mean of the gradients by a reduce-scatter, of
    which each device gets its part, updates that part, and gathers the updates of all devices. Do
    not call ``lax.pmean`` before, which would be correct but superfluous, nor ``lax.psum``, after
    which the gradients would be too large.

    Parameters are split as by :func:`zero1`. Padding is visible to tx here: the last devices may
    have zeros in their parts. A parameter that is not split is updated as a whole, on every device.

    If tx asks whether all elements are finite, as ``optax.apply_if_finite`` and
    ``optax.skip_not_finite`` do, all devices are asked, so all skip the same steps. A norm or a
    mean of several elements, as in clipping by norm and layer-wise learning rates, would be that of
    a part, and is refused.

    Wrappers of both kinds may go around it, as in ``optax.chain(optax.clip_by_global_norm(1.0),
    zero1_mapped(...))``, if the gradients are averaged with ``lax.pmean`` first. Otherwise each
    device would decide by its own gradients, and replicas would diverge, or wait for each other
    forever. :func:`zero1` has no such limits.

    If ``jax.shard_map`` is over some of the mesh axes only (``axis_names``), the others must be
    Auto, and the shardings for :func:`state_sharding` must leave them out: its specs are then what
    ``jax.shard_map`` takes. XLA splits the state over the other axes as it does the parameters.

    Args:
      tx: a transformation of this library, or ``optax.chain`` or another wrapper that contains one.
        ``q8`` and ``bfloat16`` round with the same random bits in all parts; ``min_size`` refers to
        a part.
      axis_name: the mapped axis, or a tuple of them.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``init`` and ``update`` only work where the
      axis is mapped; ``jax.shard_map`` needs ``check_vma=False``. Its state is that of tx for the
      parts, which differ between devices: the specs of the state are those of
      :func:`state_sharding`, never ``P()``.

    Raises:
      ValueError: if tx is cautious, which takes a mean over each leaf; if its storage has an
        ``axis_name``; if it contains zero1 or zero1_mapped. In ``update``, if ``check_vma`` is on,
        or if an update or the state depends on a norm or a mean of parts.
      TypeError: if tx is not a transformation of this library, or axis_name not a name.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import rmsprop, sharding
      >>> n = jax.device_count()
      >>> tx = sharding.zero1_mapped(rmsprop(0.1), "data")
      >>> params = jnp.ones((n, 4 * n))  # a row for each device, all the same
      >>> state = jax.pmap(tx.init, axis_name="data")(params)
      >>> state.nu.shape == (n, 4)
      True
      >>> updates, state = jax.pmap(tx.update, axis_name="data")(params, state)
      >>> updates.shape == (n, 4 * n)
      True

      The same in ``shard_map``:

      >>> import functools
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh, params = jax.make_mesh((n,), ("data",)), jnp.ones(4 * n)
      >>> placed = sharding.state_sharding(tx, params, NamedSharding(mesh, P()))
      >>> specs = jax.tree.map(lambda sharding: sharding.spec, placed)
      >>> shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
      >>> init = shard_map(tx.init, in_specs=P(), out_specs=specs)
      >>> update = shard_map(tx.update, in_specs=(P(), specs), out_specs=(P(), specs))
      >>> updates, state = jax.jit(update)(params, jax.jit(init)(params))
      >>> updates.shape == state.nu.shape == params.shape
      True

    Source: as for :func:`zero1`.
    """
    tx = checked(tx)
    axes = axes_of("axis_name", axis_name)
    wrapped = Zero1Mapped(tx, axes)
    if (parts := ask_without_params(tx.init)) is not None:  # otherwise init and update ask
        wrapped.check(parts)
    return transformation(wrapped)

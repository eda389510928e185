"""What a state, and the gradients that come, say about a run: scalars to log."""

import collections
from collections.abc import Iterator
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path
import optax

from rmsprop_jax import _checks, _equations
from rmsprop_jax._diagnostics._states import Followed, followed
from rmsprop_jax._diagnostics._tally import Shape, Tally
from rmsprop_jax._gradients import counterparts, gradients, without_float0
from rmsprop_jax._leaves import leaf_name, leaf_type
from rmsprop_jax._storage import Slot, is_packed, slots_of
from rmsprop_jax._types import PyTree
from rmsprop_jax.low_memory._eight_bit import EightBit
from rmsprop_jax.sharding._arguments import Partition
from rmsprop_jax.sharding._division import division
from rmsprop_jax.sharding._zero1_mapped import Zero1Mapped


def diagnostics(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params | None = None,
    grads: optax.Updates | None = None,
    *,
    per_leaf: bool = False,
) -> dict[str, jax.Array]:
    """Returns scalars to log that say what the optimizer is doing. Pure, and made for ``jit``.

    Call it before ``tx.update``, with the gradients of that step: it says what the state will do to
    them. Before the first step every second moment is 0 (or initial_scale).

    Always:

    - ``effective_lr/p5``, ``p25``, ``median``, ``p75``, ``p95``: percentiles of the effective
      learning rate ``|learning_rate| / sqrt(s + eps)``, which multiplies the next gradient, or
      ``|learning_rate| / (sqrt(s) + eps)`` with ``eps_in_sqrt=False``. s is the second moment in
      the state, the variance if centered, with its bias corrected if the rule does so. A percentile
      is one of the rates, the smallest that so many percent do not exceed. Rates that are not
      finite are left out.
    - ``below_eps``: share of elements with s < eps, or sqrt(s) < eps with ``eps_in_sqrt=False``.
      There the rule is gradient descent with a rate of almost learning_rate / sqrt(eps). Elements
      whose gradients have been exactly 0 count, too.
    - ``at_guard/root``: share of elements whose root is held at the least that is allowed, so that
      neither s nor eps decides.
    - ``at_guard/second_moment``: share of second moments at half of what one clipped gradient
      adds, or more; in 8 bits, at the highest code or the lowest that is not 0.
    - ``at_guard/momentum``: share of the momentum buffer at half of its bound or more; in 8 bits,
      at the highest code. Only with momentum.
    - ``not_finite/state``: share of elements of nu, mu and trace that are infinite or NaN.
    - ``state/bytes``: bytes of all arrays in the state.

    With grads, those of the next step:

    - ``not_finite/grads``: share of gradients that are infinite or NaN.
    - ``at_guard/grads``: share of gradients that are clipped before they are squared, at 4.6e18 in
      float32.

    With params:

    - ``not_finite/params``: share of parameters that are infinite or NaN.

    With both:

    - ``update/norm``, ``update/relative_norm``: norm of the update that ``tx.update`` would return,
      and that norm divided by the norm of the parameters.
    - ``update/lost_in_bfloat16``: share of the updates other than 0 that would leave their
      parameter unchanged, if it were rounded to bfloat16 before and after. Float32 parameters, too.
    - ``at_guard/update``: share of updates at the largest number of their dtype.

    Shares are between 0 and 1. All leaves count together, and so do several RMSProps in tx; a
    complex element counts as two. The effective learning rate contains neither what other links of
    a chain do to a gradient, nor momentum, which makes steps up to 1 / (1 - momentum) times as
    long; the update contains both. Between the steps of ``optax.MultiSteps`` the update is 0.

    The percentiles cost about 40 passes over the second moments; params and grads add a step, which
    ``jit`` shares with the step beside it. Nothing is sorted or gathered. Log every hundredth step,
    say, with a jitted function of its own or ``jax.lax.cond``.

    Args:
      tx: a transformation with an RMSProp of this library in it, whatever is around it.
      state: its state.
      params: tree of parameters, as for ``tx.update``. Needed if a wrapper depends on the tree, and
        with :func:`rmsprop_jax.sharding.zero1` unless grads are given: arrays of that state may be
        padded with zeros, which do not count.
      grads: tree of gradients, as for ``tx.update``.
      per_leaf: whether to return all this for each leaf, under names such as
        "layer/kernel/effective_lr/median", instead of for all leaves together.

    Returns:
      A dict of scalars; what is not known is left out.

      Hyperparameters are those of the next step. Schedules are evaluated at the state's count, and
      values that ``optax.inject_hyperparams`` keeps in its state are taken from there.

      With sharded arrays under ``jit``, the scalars are those of whole arrays. With
      :func:`rmsprop_jax.sharding.zero1_mapped`, call this where the axis is mapped. It gathers the
      state, which each device then holds for a moment, and returns the same on all devices.
      Elsewhere inside ``pmap`` and ``shard_map``, the scalars are those of what each device has.

    Raises:
      TypeError: if tx contains no RMSProp, or per_leaf is not a bool.
      ValueError: if state is not a state of tx for these parameters; if params are needed; or if a
        function inside ``optax.inject_hyperparams`` computes hyperparameters of tx.
      AssertionError: by chex, if a gradient does not fit its parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> tx = rmsprop(0.1, decay=0.5)
      >>> params, grads = jnp.ones(4), jnp.array([0.0, 1e-5, 1.0, 1e3])
      >>> _, state = tx.update(grads, tx.init(params))
      >>> for name, value in diagnostics(tx, state, params, grads).items():
      ...     print(f"{name:25} {value:.4g}")
      at_guard/grads            0
      at_guard/root             0
      at_guard/second_moment    0
      at_guard/update           0
      below_eps                 0.5
      effective_lr/median       0.1414
      effective_lr/p25          0.0001414
      effective_lr/p5           0.0001414
      effective_lr/p75          997.5
      effective_lr/p95          1000
      not_finite/grads          0
      not_finite/params         0
      not_finite/state          0
      update/lost_in_bfloat16   0
      update/norm               0.1636
      update/relative_norm      0.0818
      state/bytes               20
    """
    per_leaf = _checks.flag("per_leaf", per_leaf)
    if grads is not None:
        grads = without_float0(grads)
        if params is not None:
            counterparts(gradients(grads), "params", params)
    like = grads if params is None else params
    found, parts = followed(tx, state, like)
    partition = next((part for part in parts if isinstance(part, Partition)), None)
    axes = _mapped_axes(partition)
    if partition is not None and like is None:
        raise ValueError(
            "params must be given: arrays of the state may be padded with zeros, and only the "
            "shapes of the parameters tell where"
        )
    if isinstance(partition, Zero1Mapped) and not axes and grads is not None:
        raise ValueError(
            f"grads must be given where the axes {partition.axes} of zero1_mapped are mapped, "
            "inside jax.shard_map or jax.pmap; outside, leave them out"
        )

    shapes = {name: jnp.shape(leaf) for name, leaf in _numbers(like)}
    entries = [
        entry
        for one in found
        for entry in _held(one, shapes, per_leaf, partition is not None, axes)
    ]
    for kind, tree in (("grads", grads), ("params", params)):
        entries += [
            (_About(kind, _prefix(name, per_leaf), jnp.shape(leaf)), leaf)
            for name, leaf in _numbers(tree)
        ]
    if params is not None and grads is not None:
        updates = dict(_numbers(tx.update(grads, state, params)[0]))
        entries += [
            (_About("update", _prefix(name, per_leaf), jnp.shape(x)), (updates[name], x))
            for name, x in _numbers(params)
            if name in updates
        ]
    told = _told(tuple(about for about, _ in entries), [arrays for _, arrays in entries], axes)
    arrays = [leaf for leaf in jax.tree.leaves(state) if hasattr(leaf, "dtype")]
    held = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    return told | {"state/bytes": jnp.asarray(float(held), jnp.float32)}


class _About(NamedTuple):
    """What arrays are: static, where they are the arguments of a jitted function.

    Attributes:
      kind: "slots", "grads", "params" or "update".
      prefix: of the names under which they are logged.
      shape: that of the parameter.
      variant: of the rule, if they are slots.
    """

    kind: str
    prefix: str
    shape: Shape
    variant: _equations.Variant | None = None


@functools.partial(jax.jit, static_argnums=(0, 2))
def _told(
    abouts: tuple[_About, ...], all_arrays: list[Any], axes: tuple[str, ...]
) -> dict[str, jax.Array]:
    tallies: dict[str, Tally] = collections.defaultdict(Tally)
    with jax.numpy_dtype_promotion("standard"):  # of leaves of several dtypes
        for (kind, prefix, shape, variant), arrays in zip(abouts, all_arrays, strict=True):
            tally = tallies[prefix]
            if variant is not None:
                slots, scalars, eps = arrays
                tally.second_moment(slots.nu, scalars, eps, variant.eps_in_sqrt, shape)
                if slots.trace is not None:
                    tally.momentum(slots.trace, shape)
                for slot in slots:
                    if slot is not None:
                        tally.not_finite("state", slot, shape)
            elif kind == "update":
                tally.update(*arrays)
            else:
                over = axes if kind == "grads" else ()
                tally.not_finite(kind, arrays, shape, over)
                if kind == "grads":
                    tally.clipped(arrays, shape, over)
        return {
            prefix + name: value
            for prefix, tally in tallies.items()
            for name, value in tally.scalars().items()
        }


def _held(
    one: Followed, shapes: dict[str, Shape], per_leaf: bool, filled: bool, axes: tuple[str, ...]
) -> Iterator[tuple[_About, Any]]:
    """What is held of each leaf, with the scalars of its next step."""
    state, rule, hyper = one
    storage = rule.variant.storage
    scalars_in = functools.cache(lambda real: _equations.scalars(hyper, rule.variant, real))
    means, buffers = (dict(_numbers(slots_of(field))) for field in (state.mu, state.trace))
    for name, nu in _numbers(slots_of(state.nu)):
        wanted = shapes.get(name)
        slots = _equations.Slots(nu, means.get(name), buffers.get(name))
        if axes and wanted is not None:
            whole = (slot if slot is None else _gathered(slot, wanted, axes) for slot in slots)
            slots = _equations.Slots(*whole)
        shape, real = _shape(name, slots.nu.shape, wanted, filled), storage.dtype(nu)
        arrays = slots, scalars_in(real), jnp.asarray(hyper.eps, real)
        yield _About("slots", _prefix(name, per_leaf), shape, rule.variant), arrays


def _shape(name: str, have: Shape, wanted: Shape | None, filled: bool) -> Shape:
    """That of the numbers in a slot that is of this shape."""
    if wanted is None or math.prod(have) == math.prod(wanted):  # as a vector, in optax.flatten
        return have
    larger = len(have) == len(wanted) and all(a >= b for a, b in zip(have, wanted, strict=True))
    if not (filled and larger):
        raise ValueError(
            f"state must be of these parameters: nu of {name!r} has the shape {have}, and the "
            f"parameter {wanted}"
        )
    return wanted


def _mapped_axes(partition: Partition | None) -> tuple[str, ...]:
    """Those over which parts of the state lie, if this is where they are mapped."""
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    inside = isinstance(partition, Zero1Mapped) and {*partition.axes} <= {*mapped}
    return partition.axes if partition is not None and inside else ()


def _gathered(slot: Slot, shape: Shape, axes: tuple[str, ...]) -> Slot:
    """A slot of a parameter of this shape, from the parts of all devices."""
    if isinstance(slot, EightBit):
        return slot._replace(codes=_gathered(slot.codes, shape, axes))
    sizes = {name: lax.axis_size(name) for name in axes}
    for axis, names in enumerate(division(shape, sizes, pad=True)):
        if names:
            slot = lax.all_gather(slot, names, axis=axis, tiled=True)
    return slot


def _numbers(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """The floating and complex leaves of a tree, by name, or its slots."""
    for path, leaf in tree_leaves_with_path(tree, is_leaf=is_packed):
        if is_packed(leaf) or leaf_type(leaf).kind is not None:
            yield leaf_name(path), leaf


def _prefix(name: str, per_leaf: bool) -> str:
    return f"{name}/" if per_leaf and name else ""

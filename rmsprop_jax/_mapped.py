"""The axes over which ``pmap`` and ``shard_map`` map the devices, if any."""

import jax
from jax import lax


def varies_over(x: jax.Array) -> frozenset[str]:
    """The mapped axes over which an array varies, as far as its type says (needs check_vma)."""
    typed = jax.typeof(x)
    manual = getattr(typed, "manual_axis_type", None)
    return frozenset(getattr(typed, "vma", ()) if manual is None else manual.varying)


def max_over_mapped(x: jax.Array) -> jax.Array:
    """The largest x over all mapped axes, the same on each device."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if axes and varies_over(lax.axis_index(axes)):
        axes = tuple(axis for axis in axes if axis in varies_over(x))
    return lax.pmax(x, axes) if axes else x

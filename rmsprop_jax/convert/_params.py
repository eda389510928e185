"""Conversion of the parameters themselves, by the mapping for their states."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.tree_util import KeyPath
import numpy as np
import optax

from rmsprop_jax._leaves import leaf_name
from rmsprop_jax._types import PyTree
from rmsprop_jax.convert._arrays import array, place
from rmsprop_jax.convert._mapping import (
    LeafMapping,
    Name,
    assembled,
    by_path,
    refuse_unmapped,
    resolve,
    take,
)
from rmsprop_jax.convert._names import of_a_kind, refuse_prefixes


def params_from(arrays: Mapping[Name, Any], params: optax.Params, mapping: LeafMapping) -> PyTree:
    """Converts the parameters of another framework to a tree of parameters.

    Args:
      arrays: arrays of the framework, by the names in mapping: ``model.state_dict()`` of PyTorch,
        or a file of it; ``{v.path: v for v in model.trainable_variables}`` of Keras. If a
        ``state_dict`` has running statistics (running_mean, running_var), mapping decides whether
        the parameters or the statistics (see :func:`torch_norm_stats`) are taken; it must then
        have all of them. num_batches_tracked is ignored.
      params: the tree that gives structure, shapes, dtypes and placement.
      mapping: for each leaf of params, by its path such as "layer/kernel", the name of the
        framework's parameter, or a :class:`Leaf` if the layouts differ.

    Returns:
      A tree like params.

    Raises:
      ValueError: if an array is missing, left over or of the wrong shape.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import convert
      >>> params = {"fc": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}
      >>> theirs = {"fc.weight": np.ones((2, 3)), "fc.bias": np.ones(2)}
      >>> mapping = convert.torch_dense("fc", "fc")
      >>> convert.params_from(theirs, params, mapping)["fc"]["kernel"].shape
      (3, 2)
    """
    leaves = resolve(mapping, params)
    names = of_a_kind(arrays, mapping)
    refuse_prefixes(names, mapping, "arrays")
    refuse_unmapped(names, leaves)

    def fill(path: KeyPath, old: Any) -> Any:
        leaf = leaves[leaf_name(path)]
        found = [
            take(array(arrays[term.name], repr(term.name)), term, np.shape(old), repr(term.name))
            for term in leaf.terms()
        ]
        return place(old, sum(found[1:], start=found[0]))

    return jax.tree_util.tree_map_with_path(fill, params)


def params_to(params: optax.Params, mapping: LeafMapping) -> dict[Name, np.ndarray]:
    """Converts parameters to arrays of another framework: the inverse of :func:`params_from`.

    Args:
      params: tree of parameters.
      mapping: as in :func:`params_from`.

    Returns:
      Arrays by the names of the mapping.

    Raises:
      ValueError: if mapping does not match these parameters.

    Example:
      >>> import numpy as np
      >>> from rmsprop_jax import convert
      >>> params = {"fc": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}
      >>> arrays = convert.params_to(params, convert.torch_dense("fc", "fc"))
      >>> arrays["fc.weight"].shape
      (2, 3)
    """
    leaves = resolve(mapping, params)
    values = {path: np.asarray(leaf) for path, leaf in by_path(params).items()}
    shares = {
        path: values[path] / len(leaf.terms()) if leaf.also else values[path]
        for path, leaf in leaves.items()
    }
    return assembled(shares, leaves)

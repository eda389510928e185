"""One leaf of a tree: its name and its type."""

import functools
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
import numpy as np

_WRAPPED = jax.tree_util.GetAttrKey("value")


def leaf_name(path: KeyPath) -> str:
    """A leaf's place in its tree, such as "layer/kernel"; "" for a tree that is a single leaf.

    The variable in which Flax NNX wraps an array is not part of the name.
    """
    if path and path[-1] == _WRAPPED:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.lru_cache
def leaf_numbers(structure: jax.tree_util.PyTreeDef) -> list[np.uint32]:
    """A number for each leaf, which depends only on its path."""
    leaves = structure.unflatten(range(structure.num_leaves))
    paths, _ = jax.tree_util.tree_flatten_with_path(leaves)
    names: dict[str, None] = {}
    for path, _ in paths:
        name = leaf_name(path)
        while name in names:  # as in {"a/b": x, "a": {"b": y}}
            name += "/"
        names[name] = None
    return [np.uint32(zlib.crc32(name.encode())) for name in names]


class LeafType(NamedTuple):
    """The shape of a leaf, its kind (float or complex), and the dtype of its real numbers.

    None for what does not apply.
    """

    shape: tuple[int, ...] | None
    kind: type | None
    dtype: Any


def leaf_type(leaf: Any) -> LeafType:
    if hasattr(leaf, "dtype"):
        return LeafType(leaf.shape, *_kind(leaf.dtype))
    if isinstance(leaf, float | complex):
        return LeafType((), type(leaf), jnp.dtype(float))
    return LeafType(None, None, None)


_UNSIGNED = jnp.dtype(jnp.float8_e8m0fnu)  # can represent neither 0 nor negative numbers


@functools.cache
def _kind(dtype: Any) -> tuple[type | None, Any]:
    if not jnp.issubdtype(dtype, jnp.inexact) or dtype == _UNSIGNED:
        return None, dtype
    kind = complex if jnp.issubdtype(dtype, jnp.complexfloating) else float
    return kind, jnp.finfo(dtype).dtype


def is_none(leaf: Any) -> bool:
    return leaf is None


def describe(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return f"{leaf!r} of type {type(leaf).__name__}"
    if leaf.dtype == jax.dtypes.float0:
        return f"float0{list(leaf.shape)}"
    return f"{leaf.dtype}{list(leaf.shape)}"

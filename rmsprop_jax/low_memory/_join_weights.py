"""Master weights from parameters and state, and the inverse."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, tree_leaves_with_path, tree_map_with_path
import optax

from rmsprop_jax._leaves import leaf_name
from rmsprop_jax.low_memory._master_weights import MasterWeightsState, is_bfloat16
from rmsprop_jax.low_memory._parts import joined, parted


def join_weights(params: optax.Params, state: optax.OptState) -> optax.Params:
    """Returns the master weights in float32, for evaluation and checkpoints.

    Args:
      params: tree of parameters.
      state: that of :func:`master_weights`, or of a transformation that contains it.

    Returns:
      A tree like params, with bfloat16 leaves replaced by float32 ones, and the others unchanged.

    Raises:
      ValueError: if state contains no master weights, or those of other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from rmsprop_jax import low_memory
      >>> params, tx = jnp.ones((), "bfloat16"), low_memory.master_weights(optax.sgd(1.0))
      >>> updates, state = tx.update(jnp.float32(0.001), tx.init(params), params)
      >>> print(updates, low_memory.join_weights(params, state))  # too little for bfloat16
      0.0 0.9989929
    """
    corrections = _corrections(state, params)
    return tree_map_with_path(
        lambda path, p: joined(p, corrections.get(leaf_name(path))) if is_bfloat16(p) else p,
        params,
    )


def split_weights(
    weights: optax.Params, params: optax.Params, state: optax.OptState
) -> tuple[optax.Params, optax.OptState]:
    """Splits master weights into parameters and state: the inverse of :func:`join_weights`.

    With 32 bits this is exact; with fewer, the weights are rounded to nearest.

    Args:
      weights: tree of master weights, for instance from a checkpoint in float32.
      params: tree of parameters, of which only the structure, shapes and dtypes matter.
      state: that of :func:`master_weights` for params, or of a transformation that contains it.

    Returns:
      A tree like weights, in bfloat16 where params are, and state with the new corrections.

    Raises:
      ValueError: as in :func:`join_weights`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import low_memory, rmsprop
      >>> tx, weights = low_memory.master_weights(rmsprop(1e-3)), jnp.float32(1.001)
      >>> params = weights.astype("bfloat16")
      >>> params, state = low_memory.split_weights(weights, params, tx.init(params))
      >>> print(params, low_memory.join_weights(params, state))
      1 1.0010071
    """
    corrections = _corrections(state, params)

    def parts(path: KeyPath, weight: Any, param: Any) -> Any:
        if not is_bfloat16(param):
            return weight
        name = leaf_name(path)
        correction = corrections.get(name)
        bits = 16 if correction is None else 16 + jnp.iinfo(correction.dtype).bits
        weight, corrections[name] = parted(weight, bits)
        return weight

    def filled(node: Any) -> Any:
        if not _is_state(node):
            return node
        return node._replace(
            corrections=tree_map_with_path(
                lambda path, _: corrections[leaf_name(path)], node.corrections
            )
        )

    params = tree_map_with_path(parts, weights, params)
    return params, jax.tree.map(filled, state, is_leaf=_is_state)


def _is_state(node: Any) -> bool:
    return isinstance(node, MasterWeightsState)


def _corrections(state: optax.OptState, params: optax.Params) -> dict[str, jax.Array]:
    """All corrections in a state, by the paths of their parameters."""
    states = [node for node in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(node)]
    if not states:
        raise ValueError(f"state contains no master weights, got {type(state).__name__}")
    held = {
        leaf_name(path): correction
        for one in states
        for path, correction in tree_leaves_with_path(one.corrections)
    }
    shapes = {
        leaf_name(path): p.shape for path, p in tree_leaves_with_path(params) if is_bfloat16(p)
    }
    if other := sorted(name for name in held if shapes.get(name) != held[name].shape):
        raise ValueError(f"state has corrections of {other}, which do not match params in shape")
    return held

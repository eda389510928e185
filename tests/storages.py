"""A problem with leaves of every kind, for tests that run in each storage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_moved, side_by_side
from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._rule import is_ours
from rmsprop_jax._storage import is_packed, slots_of

FULL = {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "bias_correction": True}
SLOTS = ("nu", "mu", "trace")
SMALL = {"q8": low_memory.q8(min_size=16), "bfloat16": low_memory.bfloat16()}
STORAGES = {"float32": None} | SMALL
each_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
RNG = np.random.default_rng(0)
SHAPES = {"w": (4, 32), "b": (16,), "s": ()}
PARAMS = {name: jnp.asarray(RNG.standard_normal(shape), "f4") for name, shape in SHAPES.items()}
GRADS = [
    {
        name: jnp.asarray(RNG.standard_normal(shape) * 10.0 ** RNG.integers(-4, 3, shape), "f4")
        for name, shape in SHAPES.items()
    }
    for _ in range(4)
]
STACKED = jax.tree.map(lambda *leaves: np.stack(leaves), *GRADS)


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def run(tx, params=PARAMS, grads=GRADS, state=None):
    """The parameters and the state after some steps, whose structure and types never change."""
    state = None if state is None else {"": state}
    (one,) = run_each({"": tx}, params, grads, state).values()
    return one


def run_each(txs, params=PARAMS, grads=GRADS, states=None):
    """The same of many transformations, in one program: {name: (params, state)}."""
    tx, params = side_by_side(txs), dict.fromkeys(txs, params)
    fresh, states = states is None, tx.init(params) if states is None else states
    update = jax.jit(tx.update)
    for g in grads:
        before = types(states)
        updates, states = update(dict.fromkeys(txs, g), states, params)
        assert types(states) == before
        params = {name: optax.apply_updates(p, updates[name]) for name, p in params.items()}
    if fresh:
        assert_moved(states)
    return {name: (params[name], states[name]) for name in txs}


def ours(state):
    """The only RMSPropState in a state."""
    (one,) = (leaf for leaf in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(leaf))
    return one


def slot(field, name):
    """The arrays of one leaf of a field, with its own scale."""
    held = slots_of(field)[name]
    return (held.codes, held.scales[held.leaf]) if is_packed(held) else held


@functools.cache
def plain(storage, **options):
    return run(rmsprop(0.1, **(options or FULL), storage=storage))


def assert_as_plain(got, storage, rtol=1e-6):
    """Parameters and state as in an ordinary run: rounded states bit for bit.

    Where nothing is rounded at random, another program may contract products and sums otherwise.
    """
    assert_near(got, plain(storage), 0 if storage else rtol)


def assert_near(got, want, rtol):
    """And to a tenth of that absolutely; of the same structure and dtypes."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol, rtol / 10, err_msg=jax.tree_util.keystr(path))

"""Helpers that several test modules share."""

import collections
import functools
import hashlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

import real_data
from rmsprop_jax._rule import is_ours
from rmsprop_jax._storage import is_packed, slots_of

COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def gradients(steps, shape=(40,), *, dtype=np.float64, seed=0, low=-6, high=3):
    """Gradients whose sizes span 10^low to 10^high, one in ten of them exactly zero."""
    rng = np.random.default_rng(seed)
    size = (steps, *shape)
    values = rng.standard_normal(size) * 10.0 ** rng.uniform(low, high, shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = values + 1j * rng.standard_normal(size) * 10.0 ** rng.uniform(low, high, shape)
    return [g.astype(dtype) for g in np.where(rng.random(size) < 0.1, 0, values)]


def run(tx, grads, x=None, *, jit=True):
    """The updates of every step, as NumPy arrays, and the last state; params follow if given."""
    x = jnp.zeros_like(jnp.asarray(grads[0])) if x is None else jnp.asarray(x)
    update = jax.jit(tx.update) if jit else tx.update
    state, updates = tx.init(x), []
    for g in grads:
        u, state = update(jnp.asarray(g), state, x)
        x = optax.apply_updates(x, u)
        updates.append(np.asarray(u))
    return updates, state


def side_by_side(txs):
    """Many transformations as one, of {name: parameters} and with {name: state}."""

    def init(params):
        return {name: tx.init(params[name]) for name, tx in txs.items()}

    def update(grads, state, params=None):
        params = params or dict.fromkeys(txs)
        steps = {n: tx.update(grads[n], state[n], params[n]) for n, tx in txs.items()}
        return {n: u for n, (u, _) in steps.items()}, {n: s for n, (_, s) in steps.items()}

    return optax.GradientTransformation(init, update)


def assert_close(got, want, rtol, atol):
    for t, (a, b) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_allclose(
            np.asarray(a, np.result_type(a, np.float64)),
            np.asarray(b, np.result_type(a, np.float64)),
            rtol,
            atol,
            err_msg=f"step {t}",
        )


def scan_all(txs, grads, x):
    """As run, traced, for many transformations: {name: updates} and {name: last state}."""
    tx, xs = side_by_side(txs), dict.fromkeys(txs, x)

    def step(run, g):
        xs, states = run
        updates, states = tx.update(dict.fromkeys(txs, g), states, xs)
        return (optax.apply_updates(xs, updates), states), updates

    (_, states), updates = jax.lax.scan(step, (xs, tx.init(xs)), grads)
    return updates, states


def run_all(txs, grads, x=None):
    """The same, in one program."""
    x = np.zeros_like(grads[0]) if x is None else x
    return jax.device_get(jax.jit(functools.partial(scan_all, txs))(np.stack(grads), x))


def assert_moved(tree):
    """Each RMSPropState in a tree has seen gradients: what is like it is not so for want of any."""
    states = [state for state in jax.tree.leaves(tree, is_leaf=is_ours) if is_ours(state)]
    assert states
    for state in states:
        moments = [slots_of(state.nu), slots_of(state.mu)]  # a first variance is 0
        slots = jax.tree.leaves(moments, is_leaf=is_packed)
        held = [np.any(slot.codes if is_packed(slot) else slot) for slot in slots]
        assert any(held) or not held


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def mesh_of(*shape, axis_type=AxisType.Auto):
    """A mesh of the axes "x" and "y", or "x" alone."""
    devices, axes = jax.devices()[: np.prod(shape)], ("x", "y")[: len(shape)]
    return jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(shape), devices=devices)


def wait(f):
    """Two multi-device steps under way at a time can hang a machine of few cores."""
    return lambda *args: jax.block_until_ready(f(*args))


def collectives(program):
    """How many of each kind are in a compiled program, which has the root of the rule in it."""
    text = program.as_text()
    assert "sqrt(" in text
    return collections.Counter(COLLECTIVE.findall(text))


def assert_placed(tree, shardings):
    jax.tree.map(
        lambda array, place: (
            array.sharding.is_equivalent_to(place, array.ndim) or pytest.fail(str(array.sharding))
        ),
        tree,
        shardings,
    )


def bytes_held(tree):
    held = collections.Counter()
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held


def like_airfoil(folder, monkeypatch):
    """Puts a file of 203 rows in a folder, and makes it the airfoil's."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(1, 2, (203, 6))
    rows[:, 5] = 100 + rows[:, 0] - np.abs(rows[:, 1] - 1.5)
    content = "".join("\t".join(f"{v:.5g}" for v in row) + "\r\n" for row in rows).encode()
    (folder / "wing.dat").write_bytes(content)
    data_set = real_data.DataSet("wing.dat", "", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(real_data.DATA_SETS, "airfoil", data_set)
    monkeypatch.setenv("RMSPROP_JAX_DATA", str(folder))

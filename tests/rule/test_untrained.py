"""Leaves that cannot be trained: integers, bools and keys have no state and no update."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import assert_same, mesh_of
from rmsprop_jax import convert, dialects, low_memory, recipes, rmsprop, sharding
from storages import FULL, GRADS, PARAMS, each_storage

UNTRAINED = {
    "count": 3,
    "flag": True,
    "numpy": np.int64(7),
    "table": jnp.arange(6).reshape(2, 3),
    "mask": jnp.ones(4, bool),
    "nibbles": jnp.ones(4, jnp.int4),
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0), 3),
}
MIXED = PARAMS | UNTRAINED


def mixed(grads):
    return grads | dict.fromkeys(UNTRAINED)


def trained(tree):
    return {name: leaf for name, leaf in tree.items() if name in PARAMS}


def field_of(field, tree):
    """A field of the state with another tree in it, however it is held."""
    if hasattr(field, "codes"):
        return field._replace(codes=tree(field.codes), scales=field.scales)
    return tree(field)


@each_storage
@pytest.mark.parametrize("form", [{}, FULL], ids=["plain", "full"])
def test_others_are_updated_as_if_they_were_not_there(storage, form):
    """As Equinox has it: ``init`` of all arrays of a model, None where a leaf has no gradient."""
    tx = rmsprop(0.1, **form, storage=storage)
    step = jax.jit(tx.update)
    state, alone = tx.init(MIXED), tx.init(PARAMS)
    for g in GRADS:
        updates, state = step(mixed(g), state, MIXED)
        want, alone = step(g, alone, PARAMS)
        assert_same(trained(updates), want)
        assert all(updates[name] is None for name in UNTRAINED)
    for name in ("nu", "mu", "trace"):
        field = getattr(state, name)
        if field is not None:
            assert_same(field_of(field, trained), getattr(alone, name))


@each_storage
def test_state_keeps_its_form_in_loops(storage):
    tx = rmsprop(0.1, momentum=0.9, storage=storage)
    arrays = {name: leaf for name, leaf in MIXED.items() if name in PARAMS or name == "table"}

    def step(state, g):
        _, state = tx.update(g | {"table": None}, state, arrays)
        return state, None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, stacked))(tx.init(arrays))
    assert state.count == len(GRADS)
    assert_same(jax.jit(tx.init)(arrays), tx.init(arrays))


def test_float0_counts_as_no_gradient():
    """JAX gives it for integers, if it is told that they are allowed."""
    params = {"w": jnp.ones(3), "table": jnp.arange(3)}

    def loss(params):
        return jnp.sum(params["w"] ** 2)

    grads = jax.grad(loss, allow_int=True)(params)
    mesh = mesh_of(4)
    for tx in (
        rmsprop(0.1),
        rmsprop(0.1, **FULL),
        recipes.torchbeast(100, max_norm=0.1),
        sharding.zero1(rmsprop(0.1), mesh, "x"),
    ):
        updates, state = tx.update(grads, tx.init(params), params)
        want, _ = tx.update(grads | {"table": None}, tx.init(params), params)
        assert_same(updates, want)
        assert updates["table"] is None
        assert optax.tree.get(state, "nu")["table"] is None
    tx = sharding.zero1_mapped(rmsprop(0.1), "x")

    def train(params):
        grads = jax.grad(loss, allow_int=True)(params)
        return tx.update(grads, tx.init(params), params)[0]

    copies = jax.tree.map(lambda p: jnp.stack([p] * 4), params)
    updates = jax.pmap(train, axis_name="x", devices=mesh.devices.flat)(copies)
    assert_same(updates["w"][0], rmsprop(0.1).update(grads, rmsprop(0.1).init(params))[0]["w"])


def test_a_gradient_that_arrives_is_refused():
    tx = rmsprop(0.1)
    for leaf in UNTRAINED.values():
        state = tx.init({"w": jnp.ones(2), "n": leaf})
        with pytest.raises(AssertionError, match=r"\['n'\] must be None, as there was nothing to"):
            tx.update({"w": jnp.ones(2), "n": jnp.ones(2)}, state)


def test_a_tree_of_nothing_else():
    for params in (UNTRAINED, 3, jax.random.key(0), {}):
        tx = rmsprop(0.1, **FULL)
        state = tx.init(params)
        grads = jax.tree.map(lambda _: None, params)
        updates, state = tx.update(grads, state, params)
        assert jax.tree.leaves((updates, state.nu, state.mu, state.trace)) == []
        assert state.count == 1


def test_inside_wrappers_of_optax():
    params = {"w": jnp.ones(3), "table": jnp.arange(3)}
    grads = {"w": jnp.ones(3), "table": None}
    want, _ = rmsprop(0.1).update(grads, rmsprop(0.1).init(params))
    for tx in (
        optax.chain(rmsprop(0.1), optax.scale(1.0)),
        optax.masked(rmsprop(0.1), {"w": True, "table": False}),
        optax.partition({"a": rmsprop(0.1)}, {"w": "a", "table": "a"}),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert_same(updates["w"], want["w"])


def test_on_many_devices():
    mesh = mesh_of(4)
    params = {"w": jnp.ones((8, 2)), "table": jnp.arange(8), "n": jnp.int32(3)}
    grads = {"w": jnp.ones((8, 2)), "table": None, "n": None}
    where = NamedSharding(mesh, P())
    plain, _ = rmsprop(0.1).update(grads, rmsprop(0.1).init(params), params)
    placed = sharding.state_sharding(rmsprop(0.1), params, where)
    assert placed.nu == {"w": where, "table": None, "n": None}
    tx = sharding.zero1(rmsprop(0.1), mesh, "x")
    state = jax.jit(tx.init)(jax.device_put(params, where))
    assert state.nu["w"].sharding.spec == P("x")
    updates, _ = jax.jit(tx.update)(grads, state, jax.device_put(params, where))
    assert_same(updates, plain)

    mapped = sharding.zero1_mapped(rmsprop(0.1), "x")
    copies = jax.tree.map(lambda p: jnp.stack([p] * 4), params)
    state = jax.pmap(mapped.init, axis_name="x", devices=mesh.devices.flat)(copies)
    step = jax.pmap(mapped.update, axis_name="x", devices=mesh.devices.flat)
    updates, _ = step(jax.tree.map(lambda g: jnp.stack([g] * 4), grads), state)
    assert_same(updates["w"][3], plain["w"])


def test_conversions_leave_them_out():
    params, tx = {"w": jnp.ones(2), "n": jnp.int32(3)}, dialects.pytorch(momentum=0.9)
    grads = {"w": jnp.array([1.0, 2.0]), "n": None}
    _, state = tx.update(grads, tx.init(params))
    group = {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0.9}
    groups = [group | {"params": [0]}]
    for mapping in ({"w": 0}, {"w": 0, "n": 1}):
        given = convert.to_pytorch(state, params, mapping, tx, param_groups=groups)
        assert list(given["state"]) == [0]
        assert_same(convert.from_pytorch(given, params, mapping, tx), state)
    small = dialects.pytorch(momentum=0.9, storage=low_memory.bfloat16())
    assert convert.change_storage(state, params, small).nu["n"] is None

    ours, theirs = rmsprop(0.1, momentum=0.9), optax.rmsprop(0.1, momentum=0.9)
    _, state = ours.update(grads, ours.init(params))
    like = theirs.init(params)
    opt_state = convert.to_optax(state, params, ours, like)
    assert_same(opt_state[0].nu["n"], like[0].nu["n"])
    assert_same(convert.from_optax(opt_state, params, ours)._replace(count=state.count), state)

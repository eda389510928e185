"""Stochastic rounding of parameters that are sharded by shard_map or pmap."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import assert_moved, mesh_of, side_by_side, wait
from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._storage import slots_of

STACK = (8, 2, 32)  # a part for each device
GRADIENT = np.random.default_rng(0).standard_normal(STACK[1:]).astype(np.float32)
MAKE = {
    "q8": lambda axis_name: low_memory.q8(min_size=0, axis_name=axis_name),
    "bfloat16": lambda axis_name: low_memory.bfloat16(axis_name=axis_name),
}
NAMED = ["x", ("x",), ("x", "y")]


def centered(storage, axis_name=None):
    return rmsprop(0.1, centered=True, momentum=0.9, storage=MAKE[storage](axis_name))


def of_each_storage(axis_name=None):
    return side_by_side({storage: centered(storage, axis_name) for storage in MAKE})


@functools.cache
def shard_mapped(axis_name, check_vma):
    """The state of each storage after three steps on eight parts with the same gradients."""
    mesh = mesh_of(4, 2) if axis_name == ("x", "y") else mesh_of(8)
    spec, tx = P(mesh.axis_names), of_each_storage(axis_name)
    params, grads = jax.device_put(
        (np.ones(STACK, np.float32), np.broadcast_to(GRADIENT, STACK)), NamedSharding(mesh, spec)
    )
    params, grads = dict.fromkeys(MAKE, params), dict.fromkeys(MAKE, grads)
    specs = {}
    for storage in MAKE:
        one = centered(storage, axis_name)
        shapes = jax.eval_shape(one.init, params[storage])
        specs[storage] = optax.tree.map_params(
            one, lambda _: spec, shapes, transform_non_params=lambda _: P()
        )
    shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    init = shard_map(tx.init, in_specs=(spec,), out_specs=specs)
    update = shard_map(tx.update, in_specs=(spec, specs), out_specs=(spec, specs))
    state, update = wait(jax.jit(init))(params), wait(jax.jit(update))
    for _ in range(3):
        _, state = update(grads, state)
    assert_moved(state)
    return jax.device_get(state)


@functools.cache
def alone():
    tx, grads = of_each_storage(), dict.fromkeys(MAKE, GRADIENT[None])
    state, update = jax.jit(tx.init)(grads), jax.jit(tx.update)
    for _ in range(3):
        _, state = update(grads, state)
    return jax.device_get(state)


def noisy(state):
    """What was rounded at random, of the slots of a single leaf."""
    fields = (state.nu, state.mu, state.trace)
    return [getattr(field, "codes", field) for field in fields]


def assert_independent(array):
    """Of two neighbours each takes one: for half of the numbers, or fewer, not the same."""
    for a, b in itertools.combinations(array, 2):
        assert np.mean(a != b) > 0.1


def assert_alike(tree):
    for array in map(np.asarray, jax.tree.leaves(tree)):
        np.testing.assert_array_equal(array, np.broadcast_to(array[0], array.shape))


@pytest.mark.parametrize("check_vma", [False, True])
def test_shards_of_shard_map_round_alike_and_as_each_would_alone(check_vma, subtests):
    for storage, state in shard_mapped(None, check_vma).items():
        with subtests.test(storage=storage):
            for got, want in zip(*map(jax.tree.leaves, (state, alone()[storage])), strict=True):
                np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))


@pytest.mark.parametrize("axis_name", NAMED, ids=str)
@pytest.mark.parametrize("check_vma", [False, True])
def test_shards_of_a_named_axis_round_independently(axis_name, check_vma, subtests):
    for storage, state in shard_mapped(axis_name, check_vma).items():
        with subtests.test(storage=storage):
            for array in noisy(state):
                assert_independent(array)


@pytest.mark.parametrize("check_vma", [False, True])
def test_what_shard_map_replicates_stays_equal(check_vma, subtests):
    mesh, tx = mesh_of(8), of_each_storage()

    def step(weight, params, state):
        grads = jax.lax.pmean(weight[:, None] * jnp.asarray(GRADIENT), "x")
        updates, state = tx.update(dict.fromkeys(MAKE, grads), state)
        params = optax.apply_updates(params, updates)
        copies = jax.tree.map(lambda leaf: leaf[None], (params, state))
        return params, state, copies

    update = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P("x"), P(), P()),
        out_specs=(P(), P(), P("x")),
        check_vma=check_vma,
    )
    update, weights = wait(jax.jit(update)), np.arange(1, 9, dtype=np.float32)
    ones = dict.fromkeys(MAKE, np.ones(STACK[1:], np.float32))
    params = jax.device_put(ones, NamedSharding(mesh, P()))
    state = wait(jax.jit(tx.init))(params)
    for _ in range(3):
        params, state, copies = update(weights, params, state)
    for storage in MAKE:
        with subtests.test(storage=storage):
            assert_alike([part[storage] for part in copies])
            assert np.any(np.asarray(copies[0][storage]) != 1)


def test_replicas_of_pmap_stay_equal_unless_their_axis_is_named(subtests):
    txs = {
        f"{storage}, {axis_name}": centered(storage, axis_name)
        for storage, axis_name in itertools.product(MAKE, (None, "batch"))
    }
    tx = side_by_side(txs)

    def step(params, state, weight):
        grads = jax.lax.pmean(weight * jnp.asarray(GRADIENT), "batch")
        updates, state = tx.update(dict.fromkeys(txs, grads), state)
        return optax.apply_updates(params, updates), state

    update = wait(jax.pmap(step, axis_name="batch"))
    params = dict.fromkeys(txs, np.ones(STACK, np.float32))
    state = wait(jax.pmap(tx.init))(params)
    for _ in range(3):
        params, state = update(params, state, np.arange(1, 9, dtype=np.float32))
    params, state = jax.device_get((params, state))
    for name in txs:
        with subtests.test(name):
            if name.endswith("None"):
                assert_alike((params[name], state[name]))
            else:
                for array in noisy(state[name]):
                    for a, b in itertools.combinations(array, 2):
                        assert np.any(a != b)


@pytest.mark.parametrize("storage", MAKE)
@pytest.mark.parametrize("jit", [False, True])
def test_an_axis_that_is_not_mapped_is_named_by_jax(storage, jit):
    tx, params = centered(storage, "rows"), np.ones((2, 32), np.float32)
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(NameError, match="unbound axis name: rows"):
        update(params, tx.init(params))


@pytest.mark.parametrize("check_vma", [False, True])
def test_shards_of_all_sizes_have_one_scale(check_vma):
    """So a scale that is said to be replicated is: gradients from part to part up to 2^20 as large.

    Gathered, codes and scales decode as on one device, but for the bits of the rounding. With a
    large eps steps differ as much, those of the smallest by more than momentum in 8 bits can hold.
    """
    mesh, storage = mesh_of(8), low_memory.q8(min_size=0)
    tx = rmsprop(0.1, eps=2.0**20, momentum=0.9, storage=storage)
    grads = np.float32(GRADIENT * 2.0 ** np.linspace(-10, 10, 8)[:, None, None])
    params, place = np.ones(STACK, np.float32), NamedSharding(mesh, P("x"))
    shapes = jax.eval_shape(tx.init, params)
    specs = optax.tree.map_params(tx, lambda _: P("x"), shapes, transform_non_params=lambda _: P())
    shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    init = wait(jax.jit(shard_map(tx.init, in_specs=P("x"), out_specs=specs)))
    update = shard_map(tx.update, in_specs=(P("x"), specs), out_specs=(P("x"), specs))
    state, grads_on_all = init(jax.device_put(params, place)), jax.device_put(grads, place)
    lowered = jax.jit(update).lower(grads_on_all, state)
    assert lowered.as_text().count("stablehlo.all_reduce") == 2  # one a field
    update, one = wait(lowered.compile()), jax.jit(tx.init)(params)
    for _ in range(4):
        updates, state = update(grads_on_all, state)
        _, one = jax.jit(tx.update)(grads, one)
    for field, want in ((state.nu, one.nu), (state.trace, one.trace)):
        held = {shard.data.tobytes() for shard in field.scales.addressable_shards}
        assert len(held) == 1
        np.testing.assert_allclose(field.scales, want.scales, rtol=1e-6)
    state = jax.device_get(state)
    got, want = (np.asarray(slots_of(nu).decode(), np.float64) for nu in (state.nu, one.nu))
    assert np.all(abs(np.log2(got / want)) < 1)
    np.testing.assert_allclose(np.mean(got / want, (1, 2)), 1, atol=0.1)
    got, want = (np.asarray(slots_of(b).decode(), np.float64) for b in (state.trace, one.trace))
    smallest = abs(want).max() * 2.0**-12  # that int8 surely holds
    assert np.all(abs(got - want) <= np.maximum(abs(want) / 4, 4 * smallest))
    assert np.all(np.isfinite(updates))

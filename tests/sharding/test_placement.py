"""Where state_sharding places the arrays of a state, through wrappers."""

import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from helpers import assert_placed, assert_same, mesh_of, side_by_side, wait
from rmsprop_jax import low_memory, rmsprop, sharding
from sharded_params import PARAMS, RMS, WRAPPED, where

MESH = mesh_of(8)
ALL = NamedSharding(MESH, P())


def by_optax(tx, params, wanted, others):
    """The same from map_params, which asks init itself what it makes of a parameter."""
    shapes = jax.eval_shape(tx.init, params)
    return optax.tree.map_params(
        tx,
        lambda leaf, place: leaf if isinstance(leaf, optax.MaskedNode) else place,
        shapes,
        wanted,
        transform_non_params=lambda _: others,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


@pytest.mark.usefixtures("default_promotion")  # of optax's own
def test_a_state_is_placed_like_its_parameters(subtests):
    txs = {name: make() for name, make in WRAPPED.items() if name != "injected"}
    tx, wanted = side_by_side(txs), {}
    for name, one in txs.items():
        wanted[name] = sharding.state_sharding(one, PARAMS, where(MESH))
        with subtests.test(name):
            assert wanted[name] == by_optax(one, PARAMS, where(MESH), ALL)
    params = jax.device_put(dict.fromkeys(txs, PARAMS), dict.fromkeys(txs, where(MESH)))
    state = wait(jax.jit(tx.init, out_shardings=wanted))(params)
    _, new = wait(jax.jit(tx.update))(params, state, params)
    for name in txs:
        with subtests.test(name):
            assert_placed(state[name], wanted[name])
            assert_placed(new[name], wanted[name])


def test_hyperparameters_are_everywhere():
    tx = WRAPPED["injected"]()
    wanted = sharding.state_sharding(tx, PARAMS, where(MESH))
    assert wanted.inner_state.nu == wanted.inner_state.trace == where(MESH)
    assert set(wanted.hyperparams.values()) == {ALL}


@pytest.mark.parametrize("storage", [None, low_memory.q8(min_size=0)], ids=str)
def test_a_tree_that_is_one_leaf(storage):
    place, everywhere = NamedSharding(MESH, P("x")), ALL
    tx = optax.chain(rmsprop(0.1, storage=storage), optax.add_noise(0.1, 0.5, 0))
    placed = sharding.state_sharding(tx, jnp.ones(16), place)
    assert jax.tree.leaves(placed)[0] == everywhere  # the count
    arrays = jax.tree.leaves(jax.eval_shape(tx.init, jnp.ones(16)))
    for array, found in zip(arrays, jax.tree.leaves(placed), strict=True):
        assert found == (place if array.shape == (16,) else everywhere)


def test_shardings_may_be_a_prefix_and_parameters_shapes():
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    one = ALL
    prefix = {"a": NamedSharding(MESH, P("x")), "kernel": one, "scale": one, "odd": one}
    full = {**prefix, "a": dict.fromkeys(PARAMS["a"], prefix["a"])}
    tx = rmsprop(0.1)
    assert sharding.state_sharding(tx, shapes, prefix).nu == full
    assert sharding.state_sharding(tx, PARAMS, full).nu == full
    assert set(jax.tree.leaves(sharding.state_sharding(tx, shapes, one))) == {one}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x"))
        return nn.Dense(16, kernel_init=kernel)(x)


def test_flax_linen_with_boxes():
    net = Net()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 4)))
    places = nn.get_sharding(shapes, MESH)
    placed = sharding.state_sharding(rmsprop(0.1), shapes, places)
    assert placed.nu["params"]["Dense_0"]["kernel"].value.spec == P(None, "x")
    params = jax.jit(net.init, out_shardings=places)(jax.random.key(0), jnp.ones((1, 4)))
    state = wait(jax.jit(rmsprop(0.1).init, out_shardings=placed))(params)
    assert_placed(state, placed)


@pytest.mark.parametrize("way", ["fsdp", "zero1"])
@pytest.mark.parametrize("on_disk", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_state_goes_on_on_more_devices(way, on_disk, tmp_path):
    plain, params = rmsprop(0.1, momentum=0.9), jax.tree.map(jnp.asarray, PARAMS)
    grads = jax.tree.map(np.cos, PARAMS)
    _, saved = jax.jit(plain.update)(grads, plain.init(params))
    tx = sharding.zero1(plain, MESH, "x") if way == "zero1" else plain
    whole = ALL if way == "zero1" else where(MESH)
    placed = sharding.state_sharding(tx, params, whole)
    if on_disk:
        target = jax.tree.map(
            lambda array, place: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place),
            saved,
            placed,
        )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", saved)
            checkpointer.wait_until_finished()
            got = checkpointer.restore(tmp_path / "state", target)
    else:
        got = jax.device_put(saved, placed)
    assert_placed(got, placed)
    assert_same(jax.device_get(got), jax.device_get(saved))
    got = wait(jax.jit(tx.update))(jax.device_put(grads, whole), got)
    want = jax.jit(plain.update)(grads, saved)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, 1e-6)


SMALL = {
    "q8": rmsprop(0.1, storage=low_memory.q8(min_size=0)),
    "q8, momentum": rmsprop(0.1, momentum=0.9, storage=low_memory.q8(min_size=0)),
    "bfloat16": rmsprop(0.1, storage=low_memory.bfloat16()),
}


def integers(array):
    """Numbers of which neighbours differ by 1."""
    return np.int32(array.view(np.int16) if array.dtype == jnp.bfloat16 else array)


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8)])
def test_small_states_of_zero1_go_on_in_zero1_mapped_on_other_devices(before, after, subtests):
    """As on one device, but for the bits of the rounding: a number takes one of two neighbours.

    The scales are the same; and so is an update in 8 bits without momentum, before it is rounded.
    """
    one, params = side_by_side(SMALL), dict.fromkeys(SMALL, PARAMS)
    grads = jax.tree.map(np.cos, params)
    want = jax.jit(one.init)(params)
    for _ in range(2):
        _, want = jax.jit(one.update)(grads, want)

    mesh = mesh_of(before)
    tx = side_by_side({name: sharding.zero1(tx, mesh, "x") for name, tx in SMALL.items()})
    g = jax.device_put(grads, NamedSharding(mesh, P()))
    state, step = wait(jax.jit(tx.init))(g), wait(jax.jit(tx.update))
    for _ in range(2):
        _, state = step(g, state)
    assert_same(jax.device_get(state), jax.device_get(want))

    mesh = mesh_of(after)
    everywhere = NamedSharding(mesh, P())
    txs = {name: sharding.zero1_mapped(tx, "x") for name, tx in SMALL.items()}
    placed = {name: sharding.state_sharding(tx, PARAMS, everywhere) for name, tx in txs.items()}
    specs = jax.tree.map(lambda place: place.spec, placed)
    step = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)(
        side_by_side(txs).update, in_specs=(P(), specs), out_specs=(P(), specs)
    )
    g, state = jax.device_put((grads, jax.device_get(state)), (everywhere, placed))
    updates, state = wait(jax.jit(step))(g, state)
    assert_placed(state, placed)
    wanted, want = jax.jit(one.update)(grads, want)
    for name, rounded in (("q8", 1e-6), ("q8, momentum", 2**-3), ("bfloat16", 2**-7)):
        with subtests.test(name):
            for a, b in zip(*map(jax.tree.leaves, (updates[name], wanted[name])), strict=True):
                np.testing.assert_allclose(a, b, rounded)
            arrays = map(jax.tree.leaves, jax.device_get((state[name], want[name])))
            for a, b in zip(*arrays, strict=True):
                assert a.dtype == b.dtype
                if a.dtype == np.float32:  # scales, and what is never in few bits
                    np.testing.assert_allclose(a, b, 1e-6)
                else:
                    assert np.max(abs(integers(a) - integers(b))) <= 1


def test_nothing_is_compiled_to_know_where_a_state_belongs():
    """So it can be asked of parameters that fit on no device."""
    huge = {"w": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32)}
    placed = sharding.state_sharding(RMS(), huge, NamedSharding(MESH, P("x")))
    assert placed.nu["w"].shard_shape((1 << 20, 1 << 20)) == (1 << 17, 1 << 20)


def test_a_mesh_without_devices_will_do():
    mesh = AbstractMesh((1024,), ("x",), axis_types=(AxisType.Auto,))
    params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    placed = sharding.state_sharding(RMS(), params, NamedSharding(mesh, P("x")))
    assert placed.trace["w"].shard_shape((4096, 4096)) == (4, 4096)


class Fields(NamedTuple):
    """Parameters under the names of what is in a state."""

    nu: Any
    count: Any
    w: Any


@pytest.mark.parametrize("storage", [None, low_memory.q8(min_size=0)], ids=str)
def test_parameters_named_like_fields_of_the_state(storage):
    params = Fields({"w": jnp.ones((8, 8))}, jnp.ones(()), jnp.ones((8, 8)))
    where = Fields(
        {"w": NamedSharding(MESH, P(None, "x"))},
        NamedSharding(MESH, P()),
        NamedSharding(MESH, P("x")),
    )
    tx = rmsprop(0.1, momentum=0.9, storage=storage)
    placed = sharding.state_sharding(tx, params, where, memory_kind="pinned_host")
    host = jax.tree.map(lambda place: place.with_memory_kind("pinned_host"), where)
    nu = placed.nu if storage is None else placed.nu.codes
    assert nu == host
    assert placed.count == NamedSharding(MESH, P())


def test_codes_lie_where_their_parameters_do_on_any_axis():
    """Also what an exempt leaf has in their place."""
    params, place = {"w": jnp.ones((64, 776))}, NamedSharding(MESH, P(None, "x"))
    for exempt in (None, lambda path: True):
        tx = rmsprop(0.1, storage=low_memory.q8(exempt=exempt))
        placed = sharding.state_sharding(tx, params, place)
        assert placed.nu.codes["w"] == place
        state = wait(jax.jit(tx.init, out_shardings=placed))(jax.device_put(params, place))
        assert_placed(state, placed)
        assert sharding.zero1(tx, MESH, "x").init(params).nu.codes["w"].sharding.spec == P("x")


def test_python_numbers_are_parameters_too():
    for tx in (
        rmsprop(0.1),
        sharding.zero1(rmsprop(0.1), MESH, "x"),
        sharding.zero1_mapped(rmsprop(0.1), "x"),
    ):
        assert sharding.state_sharding(tx, {"a": 1.0}, ALL).nu == {"a": ALL}


@pytest.mark.parametrize("where", ["split", "everywhere", "second device"])
def test_a_step_is_compiled_once_after_an_eager_init(where):
    """The scalars of a state are born where a step leaves them, as the rest of it is."""
    place = {
        "split": NamedSharding(MESH, P("x")),
        "everywhere": ALL,
        "second device": jax.sharding.SingleDeviceSharding(jax.devices()[1]),
    }[where]
    txs = {
        "plain": rmsprop(optax.linear_schedule(0.1, 0, 9)),
        "corrected": rmsprop(0.1, bias_correction=True),
        "q8": rmsprop(0.1, storage=low_memory.q8(min_size=0)),
        "master weights": low_memory.master_weights(rmsprop(0.1)),
    }
    tx, traces = side_by_side(txs), []
    params = jax.device_put(dict.fromkeys(txs, np.ones((16, 8), np.float32)), place)

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = wait(step)(params, state)
    assert step._cache_size() == len(traces) == 1


def test_scalars_go_to_no_device_where_parameters_are_on_several():
    """As layers are, each on a device of its own, whose updates are eager."""
    params = [jax.device_put(jnp.ones(8), device) for device in jax.devices()[:2]]
    tx = rmsprop(0.1, bias_correction=True)
    updates, _ = tx.update(params, tx.init(params))
    assert [u.devices() for u in updates] == [p.devices() for p in params]


def test_fsdp_shardings_are_those_that_one_writes_by_hand():
    assert sharding.fsdp_shardings(PARAMS, MESH, "x", min_size=0) == where(MESH)
    large = {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32), "bias": np.ones(64), "a": 1.0}
    found = sharding.fsdp_shardings(large, MESH, "x")
    assert found == {"kernel": NamedSharding(MESH, P("x")), "bias": ALL, "a": ALL}
    mesh = AbstractMesh((4, 3), ("x", "y"))
    shapes = {
        "both": (12, 5),
        "apart": (9, 8),
        "four": (4096, 4096),
        "three": (33, 7),
        "odd": (7, 7),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    found = sharding.fsdp_shardings(params, mesh, ("x", "y"), min_size=10)
    want = {
        "both": P(("x", "y")),
        "apart": P("y", "x"),
        "four": P("x"),
        "three": P("y"),
        "odd": P(),
    }
    assert {name: place.spec for name, place in found.items()} == want
    assert not any(place.spec for place in sharding.fsdp_shardings([1.0], mesh, "y", min_size=0))

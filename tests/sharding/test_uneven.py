"""zero1 and zero1_mapped on six devices, which divide few of these shapes evenly."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from helpers import (
    assert_moved,
    assert_placed,
    assert_same,
    bytes_held,
    collectives,
    mesh_of,
    side_by_side,
    wait,
)
from rmsprop_jax import low_memory, rmsprop, sharding

SHAPES = {"kernel": (16, 25), "conv": (3, 7, 8), "bias": (24,), "odd": (7,), "scalar": ()}
FILLED = {"kernel": (18, 25), "conv": (3, 7, 12), "bias": (24,), "odd": (7,), "scalar": ()}
SPECS = {"kernel": P("x"), "conv": P(None, None, "x"), "bias": P("x"), "odd": P(), "scalar": P()}
NUMBERS = 3 * 25 + 3 * 7 * 2 + 4 + 7 + 1  # on a device
FORMS = {
    "momentum": rmsprop(0.01, momentum=0.9, weight_decay=0.1, initial_scale=0.5),
    "centered": rmsprop(0.01, eps=1e-4, centered=True, bias_correction=True),
}
# For these a leaf that is filled up, or in parts, is another one.
WIDE = {
    "cautious": rmsprop(0.01, momentum=0.9, cautious=True),
    "centralized": optax.chain(optax.centralize(), rmsprop(0.01)),
    "master weights, q8": low_memory.master_weights(rmsprop(0.01, storage=low_memory.q8())),
}
RNG = np.random.default_rng(0)
PARAMS = {k: RNG.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
# Whole numbers, of whose copies the mean is exact.
GRADS = [{k: np.float32(RNG.integers(-99, 100, s)) for k, s in SHAPES.items()} for _ in range(3)]
each_axis_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)


def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def alone():
    """Parameters and states after each number of steps, on one device."""
    txs = FORMS | WIDE
    params, tx = dict.fromkeys(txs, PARAMS), side_by_side(txs)
    run = [(params, jax.jit(tx.init)(params))]
    jitted = jax.jit(functools.partial(step, tx))
    for grads in GRADS:
        run.append(jitted(*run[-1], dict.fromkeys(txs, grads)))
    assert_moved(run[-1][1])
    return jax.device_get(run)


def assert_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, 1e-6, 1e-6)


def whole(txs, state, mesh):
    """As on one device."""
    where = NamedSharding(mesh, P())
    return {n: sharding.move_state(tx, state[n], PARAMS, where) for n, tx in txs.items()}


@each_axis_type
def test_zero1(axis_type, subtests):
    """The steps of one device, also of what sees a leaf as a whole; the bytes of a sixth."""
    mesh = mesh_of(6, axis_type=axis_type)
    everywhere = NamedSharding(mesh, P())
    plain = FORMS | WIDE if axis_type is AxisType.Auto else FORMS | {"cautious": WIDE["cautious"]}
    txs = {name: sharding.zero1(tx, mesh, "x") for name, tx in plain.items()}
    tx = side_by_side(txs)
    wanted = {name: sharding.state_sharding(one, PARAMS, everywhere) for name, one in txs.items()}
    params = jax.device_put(dict.fromkeys(txs, PARAMS), everywhere)
    state, update = wait(jax.jit(tx.init))(params), wait(jax.jit(functools.partial(step, tx)))
    shapes = jax.tree.map(jnp.shape, state)
    for number, grads in enumerate(GRADS):
        params, state = update(params, state, jax.device_put(dict.fromkeys(txs, grads), everywhere))
        for name in txs:
            with subtests.test(step=number, form=name):
                assert_placed(params[name], dict.fromkeys(SHAPES, everywhere))
                assert_placed(state[name], wanted[name])
                got = params[name], whole(plain, state, mesh)[name]
                want = alone()[number + 1]
                assert_close(jax.device_get(got), (want[0][name], want[1][name]))
    assert jax.tree.map(jnp.shape, state) == shapes
    assert jax.tree.map(jnp.shape, state["momentum"].trace) == FILLED
    held = bytes_held((state["momentum"].nu, state["momentum"].trace))
    assert held == dict.fromkeys(mesh.devices.flat, 2 * 4 * NUMBERS)


def test_zero1_gathers_the_updates_and_nothing_else():
    """What is filled up costs no communication."""
    mesh = mesh_of(6)
    params = jax.device_put(np.ones((64, 512), np.float32), NamedSharding(mesh, P()))
    tx = sharding.zero1(rmsprop(0.01, centered=True, momentum=0.9), mesh, "x")
    state = wait(jax.jit(tx.init))(params)
    program = jax.jit(tx.update, donate_argnums=1).lower(params, state).compile()
    assert collectives(program) == {"all-gather": 1}


def mapped(txs, mesh, params):
    specs = {
        name: jax.tree.map(
            lambda place: place.spec, sharding.state_sharding(tx, params, NamedSharding(mesh, P()))
        )
        for name, tx in txs.items()
    }
    tx, shard_map = side_by_side(txs), functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    init = shard_map(tx.init, in_specs=P(), out_specs=specs)
    update = shard_map(
        functools.partial(step, tx), in_specs=(P(), specs, P()), out_specs=(P(), specs)
    )
    return wait(jax.jit(init)), wait(jax.jit(update))


@pytest.mark.parametrize("shape", [(6,), (3, 2)], ids=str)
def test_zero1_mapped(shape, subtests):
    mesh, axes = mesh_of(*shape), ("x", "y")[: len(shape)]
    txs = {name: sharding.zero1_mapped(tx, axes) for name, tx in FORMS.items()}
    init, update = mapped(txs, mesh, PARAMS)
    everywhere = NamedSharding(mesh, P())
    params = jax.device_put(dict.fromkeys(txs, PARAMS), everywhere)
    state = init(params)
    for grads in GRADS:
        params, state = update(params, state, jax.device_put(dict.fromkeys(txs, grads), everywhere))
    of_jit = {name: sharding.zero1(tx, mesh, axes) for name, tx in FORMS.items()}
    for name in txs:
        with subtests.test(name):
            assert_placed(state[name], sharding.state_sharding(of_jit[name], PARAMS, everywhere))
            got = params[name], whole(FORMS, state, mesh)[name]
            want = alone()[-1]
            assert_close(jax.device_get(got), (want[0][name], want[1][name]))
            same = jax.eval_shape(of_jit[name].init, PARAMS)
            assert jax.tree.map(jnp.shape, state[name]) == jax.tree.map(jnp.shape, same)


@pytest.mark.parametrize("way", ["here", pytest.param("on disk", marks=pytest.mark.slow)])
def test_a_state_moves_between_any_numbers_of_devices(way, tmp_path, subtests):
    """And goes on there as it would have on one."""
    plain, (_, states) = FORMS["momentum"], alone()[1]
    state, want = states["momentum"], alone()[2][1]["momentum"]
    for number, n in enumerate((6, 5, 8, 4, 1)):
        mesh = mesh_of(n)
        everywhere, tx = NamedSharding(mesh, P()), sharding.zero1(plain, mesh, "x")
        placed = sharding.state_sharding(tx, PARAMS, everywhere)
        if way == "on disk":
            target = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                jax.eval_shape(tx.init, PARAMS),
                placed,
            )
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / f"{number}", state)
                checkpointer.wait_until_finished()
                state = checkpointer.restore(tmp_path / f"{number}", target, strict=False)
        else:
            state = sharding.move_state(tx, state, PARAMS, everywhere)
        with subtests.test(devices=n):
            assert_placed(state, placed)
            back = sharding.move_state(plain, state, PARAMS, everywhere)
            assert_same(jax.device_get(back), states["momentum"])
    mesh = mesh_of(6)
    everywhere = NamedSharding(mesh, P())
    tx = sharding.zero1(plain, mesh, "x")
    params, grads = jax.device_put((alone()[1][0]["momentum"], GRADS[1]), everywhere)
    # The state as it is on one device will do, too: the step fills it up.
    for given in (state, sharding.move_state(tx, state, PARAMS, everywhere)):
        given = jax.device_put(given, everywhere) if given is state else given
        _, new = wait(jax.jit(functools.partial(step, tx)))(params, given, grads)
        got = sharding.move_state(plain, new, PARAMS, everywhere)
        assert_close(jax.device_get(got), want)


def test_eagerly():
    """What is filled up is whole while it is updated, and in parts before and after."""
    mesh = mesh_of(6)
    tx = sharding.zero1(FORMS["momentum"], mesh, "x")
    params, grads = jax.device_put((PARAMS, GRADS[0]), NamedSharding(mesh, P()))
    state = wait(tx.init)(params)
    placed = sharding.state_sharding(tx, PARAMS, NamedSharding(mesh, P()))
    assert_placed(state, placed)
    params, state = wait(functools.partial(step, tx))(params, state, grads)
    assert_placed(state, placed)
    want_params, want = alone()[1]
    assert_close(jax.device_get(params), want_params["momentum"])
    state = sharding.move_state(FORMS["momentum"], state, PARAMS, NamedSharding(mesh, P()))
    assert_close(jax.device_get(state), want["momentum"])


@each_axis_type
def test_extra_arguments_and_parameters_left_out(axis_type):
    mesh = mesh_of(6, axis_type=axis_type)
    everywhere, plain = NamedSharding(mesh, P()), rmsprop(0.1)

    def update(updates, state, params=None, *, value, name):
        assert name == "loss"
        return plain.update(jax.tree.map(lambda g: g * value, updates), state, params)

    tx = sharding.zero1(optax.GradientTransformationExtraArgs(plain.init, update), mesh, "x")
    params = jax.device_put(
        {"used": np.ones((16, 25), "f"), "unused": np.ones((17, 25), "f")}, everywhere
    )
    state = wait(jax.jit(tx.init))(params)
    grads = {"used": params["used"], "unused": None}
    update = jax.jit(lambda g, s, value: tx.update(g, s, value=value, name="loss"))
    updates, new = wait(update)(grads, state, jax.device_put(jnp.float32(2), everywhere))
    assert updates["unused"] is None
    np.testing.assert_allclose(updates["used"], -0.1 / np.sqrt(0.1), 1e-6)
    np.testing.assert_allclose(np.asarray(new.nu["used"])[:16], 0.4, 1e-6)
    assert_placed(new.nu, jax.tree.map(lambda _: NamedSharding(mesh, P("x")), new.nu))
    np.testing.assert_array_equal(new.nu["unused"], np.zeros((18, 25)))


def test_move_state_refuses_other_states():
    mesh, tx = mesh_of(6), rmsprop(0.1)
    everywhere, params = NamedSharding(mesh, P()), {"w": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match=r"of shape \(4, 3\) in 'nu/w', got \(3, 4\)"):
        sharding.move_state(tx, tx.init({"w": jnp.ones((3, 4))}), params, everywhere)
    with pytest.raises(ValueError, match=r"state must be one of tx for params, .*, got "):
        sharding.move_state(tx, tx.init({"v": jnp.ones((4, 3))}), params, everywhere)

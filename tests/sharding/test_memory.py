"""How much of a state each device holds, in its own memory and in host memory."""

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from helpers import (
    assert_moved,
    assert_placed,
    bytes_held,
    collectives,
    mesh_of,
    side_by_side,
    wait,
)
from rmsprop_jax import low_memory, rmsprop, sharding
from sharded_params import PARAMS, RMS, where

STORAGES = {"float32": None, "bfloat16": low_memory.bfloat16(), "q8": low_memory.q8(min_size=0)}
SPLIT = {
    "kernel": ((16, 24), P("x")),
    "conv": ((3, 5, 8), P(None, None, "x")),
    "bias": ((24,), P("x")),
}
FIXED = {"odd": ((7,), P()), "scalar": ((), P())}


def bytes_of(tx, shapes):
    """Of a state on one device."""
    params = {name: np.ones(shape, np.float32) for name, (shape, _) in shapes.items()}
    arrays = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(array.size * array.dtype.itemsize for array in arrays)


@pytest.mark.parametrize("jit", [False, True])
def test_bytes_on_each_device(jit, subtests):
    """An eighth, of what an eighth can be taken of."""
    mesh, shapes = mesh_of(8), SPLIT | FIXED
    everywhere = NamedSharding(mesh, P())
    params = {name: np.ones(shape, np.float32) for name, (shape, _) in shapes.items()}
    split = {name: NamedSharding(mesh, spec) for name, (_, spec) in shapes.items()}
    plain = {name: rmsprop(0.1, momentum=0.9, storage=held) for name, held in STORAGES.items()}
    inits, given = {}, {}
    ways = ["whole", "fsdp", "zero1", "zero1_mapped"] if jit else ["whole", "fsdp", "zero1"]
    for way, (name, tx) in itertools.product(ways, plain.items()):
        given[way, name] = jax.device_put(params, split if way == "fsdp" else everywhere)
        if way == "zero1":
            tx = sharding.zero1(tx, mesh, "x")
        inits[way, name] = tx.init
        if way == "zero1_mapped":
            tx = sharding.zero1_mapped(tx, "x")
            wanted = sharding.state_sharding(tx, params, everywhere)
            specs = jax.tree.map(lambda place: place.spec, wanted)
            inits[way, name] = jax.shard_map(
                tx.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False
            )

    def init(given):
        return {case: inits[case](params) for case, params in given.items()}

    states = wait(jax.jit(init) if jit else init)(given)
    for (way, name), state in states.items():
        full, fixed = bytes_of(plain[name], shapes), bytes_of(plain[name], FIXED)
        if name == "q8":
            fixed += 2 * len(SPLIT) * 4  # a scale for each of two slots of the others
        held = bytes_held(state)
        with subtests.test(way=way, storage=name):
            want = full if way == "whole" else fixed + (full - fixed) // 8
            assert held == dict.fromkeys(jax.devices(), want)


@pytest.mark.parametrize("centered", [False, True])
def test_zero1_gathers_the_updates_and_nothing_else(centered):
    """Of gradients that every device has; the step needs no memory but that of the updates."""
    mesh = mesh_of(8)
    params = jax.device_put(np.ones((64, 512), np.float32), NamedSharding(mesh, P()))
    plain = rmsprop(0.01, eps=1e-4, centered=True, momentum=0.9) if centered else rmsprop(0.01)
    tx = sharding.zero1(plain, mesh, "x")
    state = wait(jax.jit(tx.init))(params)
    program = jax.jit(tx.update).lower(params, state, params).compile()
    assert collectives(program) == {"all-gather": 1}
    assert program.memory_analysis().temp_size_in_bytes <= params.nbytes / 8 + 4096


NEW = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 10)


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(not NEW, reason="jax < 0.10"))]
)
@pytest.mark.parametrize("storage", ["float32", pytest.param("q8", marks=pytest.mark.slow)])
def test_a_state_in_the_memory_of_the_host(axis_type, compiled, storage, subtests):
    """In between steps; jax 0.9 cannot compile the way back of only some arrays."""
    mesh = mesh_of(8, axis_type=axis_type)
    plain = RMS(storage=STORAGES[storage])
    params = {"fsdp": where(mesh), "zero1": NamedSharding(mesh, P())}
    txs = {"fsdp": plain, "zero1": sharding.zero1(plain, mesh, "x")}
    device, host = (
        {
            way: sharding.state_sharding(tx, PARAMS, params[way], memory_kind=kind)
            for way, tx in txs.items()
        }
        for kind in (None, "pinned_host")
    )
    tx, x = side_by_side(txs), jax.device_put(dict.fromkeys(txs, PARAMS), params)
    state = jax.device_put(wait(jax.jit(tx.init, out_shardings=device))(x), host)

    def step(grads, state):
        updates, state = tx.update(grads, jax.device_put(state, device))
        return updates, state if compiled else jax.device_put(state, host)

    step = jax.jit(step, donate_argnums=1, out_shardings=(params, host)) if compiled else step
    want, update = jax.jit(plain.init)(PARAMS), jax.jit(plain.update)
    for _ in range(2):
        updates, state = wait(step)(x, state)
        u, want = update(PARAMS, want)
    assert_moved(want)
    for way in txs:
        with subtests.test(way):
            assert_placed(state[way], host[way])
            kinds = jax.tree.map(lambda array: array.sharding.memory_kind, state[way])
            assert set(jax.tree.leaves(kinds.mu)) == {"pinned_host"}
            assert kinds.count == "device"
            for a, b in zip(
                *map(jax.tree.leaves, ((updates[way], state[way]), (u, want))), strict=True
            ):
                np.testing.assert_allclose(a, b, 1e-6)


def test_the_memory_of_the_host_holds_what_the_device_does_not():
    mesh = mesh_of(8)
    host = sharding.state_sharding(RMS(), PARAMS, where(mesh), memory_kind="pinned_host")
    state = jax.device_put(RMS().init(jax.tree.map(jnp.asarray, PARAMS)), host)
    on_device = [a for a in jax.tree.leaves(state) if a.sharding.memory_kind == "device"]
    assert bytes_held(on_device) == dict.fromkeys(jax.devices(), 4)

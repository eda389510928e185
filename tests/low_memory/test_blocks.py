"""Blocks of 8 bits that share an exponent, and the shards of their last axis."""

import itertools
import re
import time

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from helpers import assert_moved, assert_same, collectives, mesh_of, wait
from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax.low_memory._blocks import block_of

each_axis_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)


@each_axis_type
def test_blocks_that_do_not_fit_the_shards_are_refused_with_some_that_do(axis_type, subtests):
    for devices, block in itertools.product([2, 3, 6, 8], [1, 6, 16, 96, 128]):
        place = NamedSharding(mesh_of(devices, axis_type=axis_type), P(None, "x"))
        for piece in (1, 5, 16, 17, 44, 64, 95, 160):
            with subtests.test(devices=devices, block=block, piece=piece):
                assert_fits_or_advises(place, block, (2, devices * piece))


def assert_fits_or_advises(place, block, shape):
    piece = place.shard_shape(shape)[-1]
    params = {"a": {"w": jax.device_put(np.ones(shape, np.float32), place)}}
    init = rmsprop(0.1, storage=low_memory.q8(block, 0)).init
    try:
        state = wait(init)(params)
    except ValueError as error:
        message = str(error)
        assert f"parameter 'a/w', of shape {shape}, is sharded in pieces of {piece}," in message
        if AxisType.Explicit in place.mesh.axis_types:
            with pytest.raises(ValueError, match=re.escape(message)):
                jax.jit(init)(params)
        advice = re.search(r"q8\(block=(\d+)\) makes blocks of (\d+), which do", message)
        advised, made = map(int, advice.groups())
        state = wait(rmsprop(0.1, storage=low_memory.q8(advised, 0)).init)(params)
        assert state.nu.exponents["a"]["w"].shape[-1] * made == shape[-1]
    exponents = state.nu.exponents["a"]["w"]
    assert exponents.sharding.is_equivalent_to(place, 2)
    assert piece % (shape[-1] // exponents.shape[-1]) == 0


def test_the_advised_block_is_the_nearest_that_fits(subtests):
    """Of all that can be asked for, by the ratio of what is made to what was asked for."""
    for devices, pieces in ((2, (44, 95)), (3, (10, 12)), (6, (64, 160)), (8, (17, 96))):
        place = NamedSharding(mesh_of(devices), P("x"))
        for piece, block in itertools.product(pieces, (6, 16, 128)):
            n = devices * piece
            param = jax.device_put(np.ones(n, np.float32), place)
            if piece % block_of(n, block) == 0:
                continue
            with subtests.test(devices=devices, piece=piece, block=block):
                with pytest.raises(ValueError, match="makes blocks of") as error:
                    rmsprop(0.1, storage=low_memory.q8(block, 0)).init(param)
                made = int(re.search(r"makes blocks of (\d+)", str(error.value))[1])
                fitting = {b for asked in range(1, 2 * n) if piece % (b := block_of(n, asked)) == 0}
                nearest = min(max(b / block, block / b) for b in fitting)
                assert max(made / block, block / made) == nearest


def misfit(axis_type=AxisType.Auto, size=192 * 5):
    """A vector on six devices whose blocks do not divide its pieces."""
    place = NamedSharding(mesh_of(6, axis_type=axis_type), P("x"))
    return {"odd": jax.device_put(np.ones(size, np.float32), place)}


@each_axis_type
def test_the_advised_block_needs_no_communication(axis_type):
    params = misfit(axis_type)
    with pytest.raises(ValueError, match="its blocks of 120 do not divide") as error:
        rmsprop(0.1, storage=low_memory.q8(min_size=0)).init(params)
    block = int(re.search(r"q8\(block=(\d+)\)", str(error.value)).group(1))
    tx = rmsprop(0.1, momentum=0.9, storage=low_memory.q8(block, min_size=0))
    state = wait(jax.jit(tx.init))(params)
    program = jax.jit(tx.update).lower(params, state).compile()
    assert not collectives(program)
    _, state = wait(program)(params, state)
    assert state.nu.exponents["odd"].sharding.is_equivalent_to(params["odd"].sharding, 1)


@pytest.mark.parametrize("size", [192 * 5, 192 * 25])
@each_axis_type
def test_an_exempt_parameter_may_be_sharded_anyhow(axis_type, size):
    params = misfit(axis_type, size)
    with pytest.raises(ValueError, match="or exempt the parameter"):
        rmsprop(0.1, storage=low_memory.q8(min_size=0)).init(params)
    storage = low_memory.q8(min_size=0, exempt=lambda path: path == "odd")
    tx = rmsprop(0.1, momentum=0.9, storage=storage)
    state = wait(tx.init)(params)
    assert state.nu.codes["odd"].dtype == state.trace.codes["odd"].dtype == "float32"
    program = jax.jit(tx.update).lower(params, state).compile()
    assert not collectives(program)
    for where in (state, wait(program)(params, state)[1]):
        for field in (where.nu, where.trace):
            assert field.codes["odd"].sharding.is_equivalent_to(params["odd"].sharding, 1)
            assert field.exponents["odd"].sharding.is_equivalent_to(params["odd"].sharding, 1)


def test_a_long_axis_is_refused_at_once():
    params = misfit(size=192 * 5003)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"q8\(block=\d+\) makes blocks"):
        rmsprop(0.1, storage=low_memory.q8()).init(params)
    assert time.perf_counter() - start < 5


def test_under_an_auto_mesh_jit_knows_no_shards_and_refuses_nothing():
    """What does not fit costs communication, and has the same bits."""
    tx = rmsprop(0.1, storage=low_memory.q8(min_size=0))
    params = misfit()
    state = wait(jax.jit(tx.init))(params)
    free = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), params)
    want = jax.jit(tx.update)(free, tx.init(free))
    assert_moved(want)
    assert_same(*map(jax.device_get, (wait(jax.jit(tx.update))(params, state), want)))

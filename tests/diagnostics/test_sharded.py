"""diagnostics of arrays on eight devices: the numbers are those of the whole."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import collectives, mesh_of
from rmsprop_jax import diagnostics, low_memory, rmsprop, sharding

# Of 130 and 39 * 5 numbers, arrays of zero1 are filled up to 136 and 40 * 5.
SHAPES = {"odd": (130,), "matrix": (39, 5), "even": (16, 8), "scalar": ()}
RNG = np.random.default_rng(0)
PARAMS = {name: np.asarray(RNG.uniform(1, 2, s), np.float32) for name, s in SHAPES.items()}
GRADS = {
    n: np.asarray(RNG.standard_normal(s) * 10 ** RNG.uniform(-7, 1, s), np.float32)
    for n, s in SHAPES.items()
}
FORMS = {
    "plain": functools.partial(rmsprop, 0.1),
    "full": lambda: rmsprop(0.1, centered=True, momentum=0.9, bias_correction=True, eps=1e-6),
    "q8": lambda: rmsprop(0.1, momentum=0.9, storage=low_memory.q8(min_size=16)),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.inject_hyperparams(rmsprop)(0.1)),
}
BYTES = "state/bytes"


def tell(txs, params, grads):
    """Of each transformation after two steps."""
    told = {}
    for name, tx in txs.items():
        state = tx.init(params)
        for scale in (1.0, 3.0):
            g = jax.tree.map(lambda g, scale=scale: scale * g, grads)
            _, state = tx.update(g, state, params)
        told[name] = diagnostics(tx, state, params, grads)
    return told


@functools.cache
def on_one_device():
    with jax.numpy_dtype_promotion("standard"):
        txs = {name: make() for name, make in FORMS.items()}
        return jax.device_get(jax.jit(functools.partial(tell, txs))(PARAMS, GRADS))


def assert_told(got, want, but=()):
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name not in but:
            np.testing.assert_allclose(got[name], value, rtol=3e-6, err_msg=name)


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize(
    ("axis_type", "zero1"),
    [
        (AxisType.Explicit, False),
        (AxisType.Auto, True),
        pytest.param(AxisType.Auto, False, marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, True, marks=pytest.mark.slow),
    ],
    ids=["Explicit", "Auto, zero1", "Auto", "Explicit, zero1"],
)
def test_of_sharded_arrays(axis_type, zero1, subtests):
    """What is padded with zeros is in the bytes, and nowhere else."""
    mesh = mesh_of(8, axis_type=axis_type)
    # Under Explicit meshes the init of optax's own transformations has no mesh.
    names = [n for n in FORMS if axis_type == AxisType.Auto or n != "chain"]
    txs = {name: FORMS[name]() for name in names}
    place = NamedSharding(mesh, P())
    places = dict.fromkeys(SHAPES, place)
    if zero1:
        txs = {name: sharding.zero1(tx, mesh, "x") for name, tx in txs.items()}
    else:
        places["even"] = NamedSharding(mesh, P("x"))
    params, grads = (jax.device_put(tree, places) for tree in (PARAMS, GRADS))
    got = jax.device_get(
        jax.block_until_ready(jax.jit(functools.partial(tell, txs))(params, grads))
    )
    for name, one in got.items():
        with subtests.test(name=name):
            assert_told(one, on_one_device()[name], [BYTES] if zero1 else [])
    if zero1:
        assert got["plain"][BYTES] == on_one_device()["plain"][BYTES] + 4 * (
            6 + 5
        )  # to 136 and 200


def test_zero1_eagerly():
    mesh = mesh_of(8)
    tx = sharding.zero1(rmsprop(0.1), mesh, "x")
    params, grads = jax.device_put((PARAMS, GRADS), NamedSharding(mesh, P()))
    got = tell({"plain": tx}, params, grads)
    assert_told(got["plain"], on_one_device()["plain"], [BYTES])
    with pytest.raises(ValueError, match="params must be given: arrays of the state may be padded"):
        diagnostics(tx, tx.init(params))


def test_devices_exchange_counts_alone():
    """Whatever is gathered or reduced is a scalar, or one of each device, or of each percentile."""
    mesh = mesh_of(8)
    x = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, P("x")))
    tx = rmsprop(0.1)
    state = jax.block_until_ready(jax.jit(tx.init)(x))
    program = jax.jit(lambda state, x, g: diagnostics(tx, state, x, g)).lower(state, x, x).compile()
    assert {*collectives(program)} <= {"all-reduce", "all-gather"}
    for line in program.as_text().splitlines():
        result, found, _ = line.partition(" all-")
        if found and "(" in line:
            shapes = re.findall(r"[fs]32\[([\d,]*)\]", result)
            assert {*shapes} <= {"", "5", "8,1", "8"}, line


@pytest.mark.parametrize("name", ["full", pytest.param("q8", marks=pytest.mark.slow)])
def test_zero1_mapped(name):
    """On each device, in shard_map, from parts of the state; gradients are each device's own."""
    mesh = mesh_of(8)
    tx = sharding.zero1_mapped(FORMS[name](), "x")
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    placed = sharding.state_sharding(tx, params, NamedSharding(mesh, P()))
    specs = jax.tree.map(lambda place: place.spec, placed)

    def run(params, grads, factors):
        grads = jax.tree.map(lambda g: g * factors[0], grads)
        state = tx.init(params)
        for scale in (1.0, 3.0):
            g = jax.tree.map(lambda g, scale=scale: scale * g, grads)
            _, state = tx.update(g, state, params)
        told = diagnostics(tx, state, params, grads)
        return jax.tree.map(lambda scalar: scalar[None], told), state

    factors = jnp.linspace(0.5, 1.5, 8)  # of mean 1
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=(P("x"), specs), check_vma=False
    )
    program = jax.jit(mapped)
    for last, share in ((np.inf, 1 / 8), (1.5, 0.0)):
        told, state = jax.block_until_ready(program(params, GRADS, factors.at[7].set(last)))
        for key, value in told.items():  # the same on all devices
            np.testing.assert_array_equal(value, np.full(8, value[0]), err_msg=key)
        if last == 1.5 and name != "q8":  # whose parts are rounded by the same bits
            first = {key: value[0] for key, value in told.items()}
            assert_told(first, on_one_device()[name], [BYTES])
        np.testing.assert_allclose(told["not_finite/grads"][0], share, rtol=1e-6)
        if last == 1.5:  # outside, where all parts are one array, it is filled up
            outside = diagnostics(tx, state, params)
            assert outside.keys() < told.keys()
            assert_told(outside, {n: told[n][0] for n in outside}, [BYTES])
    with pytest.raises(ValueError, match=r"grads must be given where the axes \('x',\) of zero1_m"):
        diagnostics(tx, state, params, GRADS)

"""Ways to shard that combine parts of the library, each compared with one device."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import bytes_held, mesh_of, wait
from rmsprop_jax import rmsprop, sharding

KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)
RNG = np.random.default_rng(0)
PARAMS = {
    "kernel": RNG.uniform(-1, 1, (64, 32)).astype(np.float32),
    "bias": RNG.uniform(-1, 1, 32).astype(np.float32),
}
X = RNG.uniform(-1, 1, (6, 16, 64)).astype(np.float32)
# With an eps that keeps the rounding of gradients near 0 out of the steps.
RMS = rmsprop(0.01, eps=1e-3, momentum=0.9)
NUMBERS = sum(p.size for p in PARAMS.values())


def loss(params, x):
    return jnp.mean((x @ params["kernel"] + params["bias"][None] - 1) ** 2)


def train(tx, params, state, batches, place=lambda x: x):
    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    for x in batches:
        params, state = jax.block_until_ready(step(params, state, place(x)))
    return params, state


def close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), got, want)


def most_of(state, each=4):
    """Numbers on the device that has the most of a state."""
    return max(bytes_held(jax.tree.leaves(state)).values()) / each


@pytest.mark.usefixtures("default_promotion")  # of optax's own
@KINDS
def test_zero2_is_accumulation_inside_zero1(kind):
    """Gradients that wait for a step are split as the state is.

    Outside, each device has all of them at first, and later if XLA wants it so.
    """
    mesh = mesh_of(8, axis_type=kind)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    rows = functools.partial(jax.device_put, device=NamedSharding(mesh, P("x")))
    inside = sharding.zero1(optax.MultiSteps(RMS, 2), mesh, "x")
    outside = optax.MultiSteps(sharding.zero1(RMS, mesh, "x"), 2).gradient_transformation()
    # Both programs reduce a matrix that is split along the sum, which an Explicit mesh refuses.
    place = rows if kind is AxisType.Auto else lambda x: x
    held = {}
    for name, tx in (("inside", inside), ("outside", outside)):
        state = wait(jax.jit(tx.init))(params)
        held[name] = most_of(state)
        got, state = train(tx, params, state, X, place)
        one = optax.MultiSteps(RMS, 2)
        close(got, train(one, PARAMS, one.init(PARAMS), X)[0])
        if name == "inside":
            assert most_of(state) == held[name]
    assert held["inside"] <= 3 * NUMBERS / 8 + 3 < NUMBERS < held["outside"]


def test_hsdp_splits_within_a_group_and_copies_between_groups():
    mesh = jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    where = sharding.fsdp_shardings(PARAMS, mesh, "fsdp", min_size=0)
    params = jax.device_put(PARAMS, where)
    rows = functools.partial(jax.device_put, device=NamedSharding(mesh, P(("replica", "fsdp"))))
    want, _ = train(RMS, PARAMS, RMS.init(PARAMS), X)
    # The state with its parameters, or split once more, between the groups.
    for tx, parts in ((RMS, 4), (sharding.zero1(RMS, mesh, "replica", where), 8)):
        state = wait(jax.jit(tx.init))(params)
        got, state = train(tx, params, state, X, rows)
        close(got, want)
        assert most_of(state) <= 2 * NUMBERS / parts + 1
        for name, array in state.trace.items():
            assert math.prod(array.sharding.shard_shape(array.shape)) == array.size / parts, name


@KINDS
def test_zero1_beside_tensor_parallelism(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    where = {
        "kernel": NamedSharding(mesh, P(None, "model")),
        "bias": NamedSharding(mesh, P("model")),
    }
    params = jax.device_put(PARAMS, where)
    tx = sharding.zero1(RMS, mesh, "data", where)
    state = wait(jax.jit(tx.init))(params)
    got, state = train(tx, params, state, X)
    close(got, train(RMS, PARAMS, RMS.init(PARAMS), X)[0])
    assert most_of(state) <= 2 * NUMBERS / 8 + 1
    assert state.nu["kernel"].sharding.spec == P("data", "model")
    assert got["kernel"].sharding.spec == P(None, "model")


def mapped_over_data(kind):
    """zero1_mapped in a program that each row of the mesh runs, and init and specs for it."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    where = {
        "kernel": NamedSharding(mesh, P(None, "model")),
        "bias": NamedSharding(mesh, P("model")),
    }
    tx = sharding.zero1_mapped(RMS, "data")
    # Of the axes that shard_map is over; the others are XLA's.
    placed = sharding.state_sharding(tx, PARAMS, NamedSharding(mesh, P()))
    specs = jax.tree.map(lambda sharding: sharding.spec, placed)
    mapped = functools.partial(jax.shard_map, mesh=mesh, axis_names={"data"}, check_vma=False)
    init = jax.jit(mapped(tx.init, in_specs=P(), out_specs=specs))

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(mapped(step, in_specs=(P(), specs, P("data")), out_specs=(P(), specs)))
    return jax.device_put(PARAMS, where), init, step


def test_zero1_mapped_beside_tensor_parallelism():
    params, init, step = mapped_over_data(AxisType.Auto)
    state = wait(init)(params)
    for x in X:
        params, state = wait(step)(params, state, x)
    close(params, train(RMS, PARAMS, RMS.init(PARAMS), X)[0])
    assert state.nu["kernel"].sharding.spec == P("data", "model")
    # Of the bias, the model's axis is the one that is split here, and only once.
    assert most_of(state) <= 2 * (PARAMS["kernel"].size / 8 + PARAMS["bias"].size / 4) + 1


def test_zero1_mapped_needs_auto_axes_where_it_is_not_mapped():
    params, init, _ = mapped_over_data(AxisType.Explicit)
    with pytest.raises(ValueError, match=r"zero1_mapped needs Auto axes .* got 'bias' split"):
        init(params)

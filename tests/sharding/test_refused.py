"""What state_sharding, zero1 and zero1_mapped refuse."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import mesh_of, wait
from rmsprop_jax import low_memory, rmsprop, sharding
from sharded_params import PARAMS

MESH = mesh_of(8)
ALL = NamedSharding(MESH, P())
MIXED = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit))
ZERO = sharding.zero1(rmsprop(0.1), MESH, "x")
CAUTIOUS = optax.chain(rmsprop(0.1, momentum=0.9, cautious=True))
REFUSED = [
    (lambda: sharding.fsdp_shardings(PARAMS, ALL, "x"), TypeError, "mesh must be .*, got NamedSh"),
    (lambda: sharding.fsdp_shardings(PARAMS, MESH, "z"), ValueError, "axis must be of the mesh.*z"),
    (
        lambda: sharding.fsdp_shardings(PARAMS, MESH, "x", min_size=-1),
        ValueError,
        "min_size must be at least 0, got -1",
    ),
    (
        lambda: sharding.fsdp_shardings(PARAMS, MESH, "x", min_size=0.5),
        TypeError,
        "min_size must be an integer, got 0.5",
    ),
    (lambda: sharding.zero1(rmsprop, MESH, "x"), TypeError, "tx must be a gradient"),
    (lambda: sharding.zero1(rmsprop(0.1), "x", "x"), TypeError, "mesh must be a jax.sharding.Mesh"),
    (
        lambda: sharding.zero1(rmsprop(0.1), MESH, "y"),
        ValueError,
        r"axis must be of the mesh, whose axes are \('x',\), got \('y',\)",
    ),
    (lambda: sharding.zero1(rmsprop(0.1), MESH, ()), TypeError, "axis must be a name or a tuple"),
    (lambda: sharding.zero1(rmsprop(0.1), MESH, ("x", "x")), TypeError, "of different names"),
    (
        lambda: sharding.zero1(ZERO, MESH, "x"),
        ValueError,
        "zero1_mapped inside it: put them outside",
    ),
    (
        lambda: sharding.zero1_mapped(ZERO, "x"),
        ValueError,
        "zero1_mapped inside it: put them outside",
    ),
    (
        lambda: sharding.zero1_mapped(
            rmsprop(0.1, storage=low_memory.bfloat16(axis_name="x")), "x"
        ),
        ValueError,
        "the storage of tx must not have an axis_name",
    ),
    (
        lambda: sharding.state_sharding(
            rmsprop(0.1), PARAMS, NamedSharding(MESH, P(P.UNCONSTRAINED))
        ),
        ValueError,
        "shardings must not be unconstrained",
    ),
    (lambda: sharding.zero1(rmsprop(0.1), MESH, ("x", "y")), ValueError, "axis must be"),
    (lambda: sharding.zero1(rmsprop(0.1), MESH, 0), TypeError, "got 0"),
    (
        lambda: sharding.zero1(rmsprop(0.1), MIXED, "x"),
        ValueError,
        "mesh must have axes that are all Auto or all Explicit",
    ),
    (
        lambda: sharding.zero1(rmsprop(0.1), MESH, "x", NamedSharding(MIXED, P())),
        ValueError,
        "shardings must be on the mesh",
    ),
    (lambda: sharding.zero1(rmsprop(0.1), MESH, "x", P()), TypeError, "must be of jax.sharding"),
    (lambda: sharding.zero1_mapped(optax.sgd(0.1), "x"), TypeError, "tx must be an RMSProp"),
    (lambda: sharding.zero1_mapped(CAUTIOUS, "x"), ValueError, "tx must not be cautious.*zero1"),
    (lambda: sharding.zero1_mapped(rmsprop(0.1), 0), TypeError, "axis_name must be a name"),
    (lambda: sharding.zero1_mapped(rmsprop(0.1), ()), TypeError, "axis_name must be a name"),
    (lambda: sharding.state_sharding(0.1, PARAMS, ALL), TypeError, "tx must be a grad.*0.1"),
    (lambda: sharding.state_sharding(rmsprop(0.1), PARAMS, P()), TypeError, "NamedSharding, got"),
    (
        lambda: sharding.state_sharding(
            rmsprop(0.1), PARAMS, SingleDeviceSharding(jax.devices()[0])
        ),
        TypeError,
        "shardings must be of jax.sharding.NamedSharding, got SingleDeviceSharding",
    ),
    (lambda: sharding.state_sharding(rmsprop(0.1), PARAMS, {"a": ALL}), ValueError, "kernel"),
    (lambda: sharding.state_sharding(rmsprop(0.1), {}, {}), ValueError, "on one mesh"),
    (
        lambda: sharding.state_sharding(
            rmsprop(0.1), {"a": 1.0, "b": 1.0}, {"a": ALL, "b": NamedSharding(MIXED, P())}
        ),
        ValueError,
        "shardings must be on one mesh",
    ),
    (
        lambda: sharding.state_sharding(ZERO, PARAMS, NamedSharding(MESH, P("x"))),
        ValueError,
        "shardings must be those of zero1",
    ),
    (
        lambda: sharding.state_sharding(sharding.zero1_mapped(rmsprop(0.1), "y"), PARAMS, ALL),
        ValueError,
        r"axis_name of zero1_mapped must be of the mesh, whose axes are \('x',\), got \('y',\)",
    ),
    (
        lambda: sharding.state_sharding(optax.chain(ZERO), PARAMS, ALL),
        ValueError,
        r"must not have zero1 or zero1_mapped inside it.*zero1\(optax.chain",
    ),
    (
        lambda: sharding.state_sharding(
            rmsprop(0.1), {"w": jnp.ones(12)}, NamedSharding(MESH, P("x"))
        ),
        ValueError,
        r"parameter 'w' has the shape \(12,\), which .*'x'.* does not divide",
    ),
    (
        lambda: sharding.state_sharding(
            rmsprop(0.1), {"w": jnp.ones(8)}, NamedSharding(MESH, P(None, "x"))
        ),
        ValueError,
        "parameter 'w'",
    ),
    (
        lambda: sharding.state_sharding(rmsprop(0.1), PARAMS, ALL, memory_kind="moon"),
        ValueError,
        "moon",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=re.compile(message, re.S)):
        call()


def test_codes_are_split_as_their_parameters_are():
    params = {"w": jnp.ones((8, 40)), "v": jnp.ones((2, 40)), "u": jnp.ones((2, 41))}
    tx = rmsprop(0.1, storage=low_memory.q8(min_size=0))
    with pytest.raises(ValueError, match=r"'u' has the shape \(2, 41\), which .* does not divide"):
        sharding.state_sharding(tx, params, NamedSharding(MESH, P(None, "x")))
    tx = sharding.zero1(tx, MESH, "x")
    state = wait(jax.jit(tx.init))(jax.device_put(params, ALL))
    assert state.nu.codes["w"].sharding.spec == P("x")
    assert state.nu.codes["v"].sharding.spec == P(None, "x")
    assert state.nu.codes["u"].is_fully_replicated
    assert state.nu.scales.is_fully_replicated


PAIRS = optax.LookaheadParams.init_synced({"w": jnp.ones((16, 8)), "b": jnp.ones(8)})


def lookahead(tx):
    return optax.lookahead(tx, 3, 0.5)


@pytest.mark.parametrize("make", [lambda: rmsprop(0.1, momentum=0.9), lambda: optax.adam(0.1)])
@pytest.mark.filterwarnings("ignore:.*has no attribute")
def test_what_has_a_parameters_shape_but_not_its_path_is_named(make):
    tx = lookahead(make())
    with pytest.warns(UserWarning, match=r"on every device: fast_state/.*nu/b, .*nu/w") as caught:
        placed = sharding.state_sharding(tx, PAIRS, ALL)
    assert len(caught) == 1
    assert {*jax.tree.leaves(placed)} == {ALL}
    zero = sharding.zero1(tx, MESH, "x")
    with pytest.warns(UserWarning, match=r"put zero1 inside: optax.lookahead\(zero1"):
        state = zero.init(PAIRS)
    with pytest.raises(ValueError, match=r"gradients must be in a tree like params, .* got"):
        zero.update(PAIRS.fast, state, PAIRS)


@pytest.mark.usefixtures("default_promotion")  # of optax's own
def test_zero1_belongs_inside_lookahead():
    pairs = jax.device_put(PAIRS, ALL)
    tx, plain = lookahead(ZERO), lookahead(rmsprop(0.1))
    state = wait(jax.jit(tx.init))(pairs)
    assert state.fast_state.nu["w"].sharding.spec == P("x")
    updates, _ = wait(jax.jit(tx.update))(pairs.fast, state, pairs)
    want, _ = jax.jit(plain.update)(PAIRS.fast, plain.init(PAIRS), PAIRS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), updates, want)


def test_gradients_of_zero1_mapped_are_in_the_tree_of_the_parameters():
    tx = sharding.zero1_mapped(rmsprop(0.1), "x")
    update = jax.vmap(lambda p: tx.update({"v": p}, None, {"w": p}), axis_name="x", axis_size=8)
    with pytest.raises(ValueError, match="gradients must be in a tree like params"):
        update(jnp.ones((8, 16)))


@pytest.mark.parametrize("make", [lambda: optax.adafactor(0.1, 4), lambda: optax.lbfgs(0.1)])
@pytest.mark.usefixtures("default_promotion")  # of optax's own
def test_shapes_that_are_alike_by_chance_are_nobodys(make):
    """Factored moments have the paths of their parameters; nothing is said of them."""
    params = {"a": jnp.ones((16, 8)), "b": jnp.ones(8)}
    placed = sharding.state_sharding(make(), params, NamedSharding(MESH, P("x")))
    assert jax.tree.leaves(placed)

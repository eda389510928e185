"""Where state_sharding and the ZeRO wrappers put what, through wrappers; and what they refuse."""

import functools
import re
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from helpers import assert_placed, bytes_held, mesh_of, wait
from rmsprop_jax import describe, low_memory, rmsprop, scale_by_rms, sharding

SHAPES = {"a": {"kernel": (16, 8), "bias": (8,)}, "kernel": (8,), "scale": (), "odd": (5, 8)}
SPECS = {
    "a": {"kernel": P("x"), "bias": P("x")},
    "kernel": P("x"),
    "scale": P(),
    "odd": P(None, "x"),
}


def is_shape(node):
    return isinstance(node, tuple) and not isinstance(node, P)


PARAMS = jax.tree.map(lambda shape: np.ones(shape, np.float32), SHAPES, is_leaf=is_shape)


def where(mesh):
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda node: isinstance(node, P)
    )


def labels(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "rest", params)


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


RMS = functools.partial(rmsprop, 0.1, centered=True, momentum=0.9)
WRAPPED = {
    "alone": RMS,
    "corrected": lambda: rmsprop(0.1, bias_correction=True),
    "scaled": scale_by_rms,
    "bfloat16": lambda: RMS(storage=low_memory.bfloat16()),
    "q8": lambda: RMS(storage=low_memory.q8(1, 0)),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), RMS(), optax.trace(0.9)),
    "named chain": lambda: optax.named_chain(("rms", RMS()), ("ema", optax.ema(0.9))),
    "masked": lambda: optax.masked(RMS(), matrices),
    "partition": lambda: optax.partition({"matrix": RMS(), "rest": optax.sgd(0.1)}, labels),
    "multi steps": lambda: optax.MultiSteps(RMS(), 2),
    "if finite": lambda: optax.apply_if_finite(RMS(), 3),
    "injected": lambda: optax.inject_hyperparams(rmsprop)(0.1, momentum=0.9),
    "of optax": lambda: optax.adam(0.1),
    "noise": lambda: optax.chain(RMS(), optax.add_noise(0.1, 0.5, 0)),
}


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


@pytest.mark.parametrize("name", [name for name in WRAPPED if name != "injected"])
def test_a_state_is_placed_like_its_parameters(name):
    mesh, tx = mesh_of(8), WRAPPED[name]()
    everywhere = NamedSharding(mesh, P())
    wanted = sharding.state_sharding(tx, PARAMS, where(mesh))
    assert wanted == by_optax(tx, PARAMS, where(mesh), everywhere)
    params = jax.device_put(PARAMS, where(mesh))
    state = wait(jax.jit(tx.init, out_shardings=wanted))(params)
    assert_placed(state, wanted)
    program = jax.jit(tx.update).lower(params, state, params).compile()
    assert_placed(wait(program)(params, state, params)[1], wanted)


def test_hyperparameters_are_everywhere():
    mesh, tx = mesh_of(8), WRAPPED["injected"]()
    wanted = sharding.state_sharding(tx, PARAMS, where(mesh))
    assert wanted.inner_state.nu == wanted.inner_state.trace == where(mesh)
    assert set(wanted.hyperparams.values()) == {NamedSharding(mesh, P())}


IN_EXPLICIT = ["alone", "q8", "chain", "multi steps"]  # init of optax's own has no mesh there


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        *((name, AxisType.Auto) for name in WRAPPED),
        *((name, AxisType.Explicit) for name in IN_EXPLICIT),
    ],
)
def test_zero1_around_wrappers(name, axis_type):
    """The same bits, for gradients that every device has, in the places of state_sharding."""
    mesh, plain = mesh_of(8, axis_type=axis_type), WRAPPED[name]()
    everywhere = NamedSharding(mesh, P())
    params, tx = jax.device_put(PARAMS, everywhere), sharding.zero1(plain, mesh, "x")
    wanted = sharding.state_sharding(tx, params, everywhere)
    assert wanted == sharding.state_sharding(plain, params, where(mesh))
    state = wait(jax.jit(tx.init))(params)
    want, grads = plain.init(jax.tree.map(jnp.asarray, PARAMS)), jax.tree.map(jnp.cos, params)
    update, alone = jax.jit(tx.update), jax.jit(plain.update)
    for _ in range(3):
        updates, state = wait(update)(grads, state, params)
        u, want = alone(*jax.device_get((grads, want, params)))
        assert_placed(state, wanted)
        assert_placed(updates, jax.tree.map(lambda _: everywhere, updates))
    assert jax.tree.structure((updates, state)) == jax.tree.structure((u, want))
    for got, ours in zip(*map(jax.tree.leaves, ((updates, state), (u, want))), strict=True):
        if not jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(got, ours, 1e-6, 1e-6)


@pytest.mark.parametrize("storage", [None, low_memory.q8(1, 0)], ids=str)
def test_a_tree_that_is_one_leaf(storage):
    mesh = mesh_of(8)
    place, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    tx = optax.chain(rmsprop(0.1, storage=storage), optax.add_noise(0.1, 0.5, 0))
    placed = sharding.state_sharding(tx, jnp.ones(16), place)
    assert jax.tree.leaves(placed)[0] == everywhere  # the count
    arrays = jax.tree.leaves(jax.eval_shape(tx.init, jnp.ones(16)))
    for array, found in zip(arrays, jax.tree.leaves(placed), strict=True):
        assert found == (place if array.shape == (16,) else everywhere)


def test_shardings_may_be_a_prefix_and_parameters_shapes():
    mesh = mesh_of(8)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    one = NamedSharding(mesh, P())
    prefix = {"a": NamedSharding(mesh, P("x")), "kernel": one, "scale": one, "odd": one}
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
    mesh, net = mesh_of(8), Net()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 4)))
    places = nn.get_sharding(shapes, mesh)
    placed = sharding.state_sharding(rmsprop(0.1), shapes, places)
    assert placed.nu["params"]["Dense_0"]["kernel"].value.spec == P(None, "x")
    params = jax.jit(net.init, out_shardings=places)(jax.random.key(0), jnp.ones((1, 4)))
    state = wait(jax.jit(rmsprop(0.1).init, out_shardings=placed))(params)
    assert_placed(state, placed)


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)
def test_flax_nnx_with_zero1(axis_type):
    mesh = mesh_of(8, axis_type=axis_type)
    everywhere = NamedSharding(mesh, P())
    tx = sharding.zero1(rmsprop(0.1, momentum=0.9), mesh, "x")
    with jax.set_mesh(mesh):
        model = nnx.Linear(8, 24, rngs=nnx.Rngs(0))
        nnx.update(model, jax.device_put(nnx.state(model), everywhere))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
            optimizer.update(model, grads)

        x = jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh, P("x")))
        for _ in range(2):
            step(model, optimizer, x)
            jax.block_until_ready(nnx.state(optimizer))
    specs = [
        {name: value.sharding.shard_shape(value.shape) for name, value in slot.items()}
        for slot in map(nnx.to_pure_dict, (optimizer.opt_state.nu, optimizer.opt_state.trace))
    ]
    assert specs == [{"kernel": (1, 24), "bias": (3,)}] * 2
    assert all(p.is_fully_replicated for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("way", ["fsdp", "zero1"])
def test_a_checkpoint_is_restored_onto_more_devices(way, tmp_path):
    plain, params = rmsprop(0.1, momentum=0.9), jax.tree.map(jnp.asarray, PARAMS)
    _, want = plain.update(params, plain.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", want)
        checkpointer.wait_until_finished()
        mesh = mesh_of(8)
        tx = sharding.zero1(plain, mesh, "x") if way == "zero1" else plain
        whole = NamedSharding(mesh, P()) if way == "zero1" else where(mesh)
        placed = sharding.state_sharding(tx, params, whole)
        target = jax.tree.map(
            lambda array, place: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place),
            want,
            placed,
        )
        got = checkpointer.restore(tmp_path / "state", target)
    assert_placed(got, placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


NEW = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 10)


@pytest.mark.parametrize("storage", [None, low_memory.q8(1, 0)], ids=str)
@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)
@pytest.mark.parametrize("way", ["fsdp", "zero1"])
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.skipif(not NEW, reason="jax < 0.10"))]
)
def test_a_state_in_the_memory_of_the_host(way, axis_type, storage, compiled):
    """In between steps; jax 0.9 cannot compile the way back of only some arrays."""
    mesh, tx = mesh_of(8, axis_type=axis_type), RMS(storage=storage)
    params = where(mesh) if way == "fsdp" else NamedSharding(mesh, P())
    if way == "zero1":
        tx = sharding.zero1(tx, mesh, "x")
    device = sharding.state_sharding(tx, PARAMS, params)
    host = sharding.state_sharding(tx, PARAMS, params, memory_kind="pinned_host")
    x = jax.device_put(PARAMS, params)
    state = jax.device_put(wait(jax.jit(tx.init, out_shardings=device))(x), host)

    def step(grads, state):
        updates, state = tx.update(grads, jax.device_put(state, device))
        return updates, state if compiled else jax.device_put(state, host)

    step = jax.jit(step, donate_argnums=1, out_shardings=(params, host)) if compiled else step
    for _ in range(2):
        updates, state = wait(step)(x, state)
    assert_placed(state, host)
    kinds = jax.tree.map(lambda array: array.sharding.memory_kind, state)
    assert set(jax.tree.leaves(kinds.mu)) == {"pinned_host"}
    assert kinds.count == "device"
    plain = RMS(storage=storage)
    want = plain.init(jax.tree.map(jnp.asarray, PARAMS))
    for _ in range(2):
        u, want = jax.jit(plain.update)(PARAMS, want)
    for a, b in zip(*map(jax.tree.leaves, ((updates, state), (u, want))), strict=True):
        np.testing.assert_allclose(a, b, 1e-6)


def test_the_memory_of_the_host_holds_what_the_device_does_not():
    mesh = mesh_of(8)
    host = sharding.state_sharding(RMS(), PARAMS, where(mesh), memory_kind="pinned_host")
    state = jax.device_put(RMS().init(jax.tree.map(jnp.asarray, PARAMS)), host)
    on_device = [a for a in jax.tree.leaves(state) if a.sharding.memory_kind == "device"]
    assert bytes_held(on_device) == dict.fromkeys(jax.devices(), 4)


def test_zero1_of_one_device_and_of_no_parameters():
    mesh = mesh_of(1)
    tx = sharding.zero1(rmsprop(0.1), mesh, "x")
    updates, _ = tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))
    np.testing.assert_allclose(updates["w"], -0.1 / np.sqrt(0.1), 1e-6)
    assert tx.update({}, tx.init({}))[0] == {}


def test_zero1_inside_a_chain():
    mesh = mesh_of(8)
    everywhere = NamedSharding(mesh, P())
    inner = sharding.zero1(rmsprop(0.1), mesh, "x")
    tx = optax.chain(optax.clip_by_global_norm(1.0), inner, optax.scale(0.5))
    plain = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(0.1), optax.scale(0.5))
    params = jax.device_put(PARAMS, everywhere)
    state = wait(jax.jit(tx.init))(params)
    updates, state = wait(jax.jit(tx.update))(params, state)
    want, _ = jax.jit(plain.update)(PARAMS, plain.init(jax.tree.map(jnp.asarray, PARAMS)))
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, 1e-6)
    assert_placed(state[1].nu, where(mesh))
    assert describe(tx) == describe(plain)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("with_params", [False, True])
def test_zero1_leaves_a_parameter_out(jit, with_params):
    """A gradient of None keeps its state where and as it is."""
    mesh, tx = mesh_of(8), None
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    tx = sharding.zero1(RMS(), mesh, "x")
    update = jax.jit(tx.update) if jit else tx.update
    _, state = wait(update)(params, wait(tx.init)(params))
    grads = {**params, "a": {"kernel": None, "bias": params["a"]["bias"]}}
    updates, new = wait(update)(grads, state, params if with_params else None)
    assert updates["a"]["kernel"] is None
    for old, now in ((state.nu, new.nu), (state.mu, new.mu), (state.trace, new.trace)):
        assert_placed(now, where(mesh))
        np.testing.assert_array_equal(old["a"]["kernel"], now["a"]["kernel"])
        assert np.any(np.asarray(old["kernel"]) != now["kernel"])


def test_zero1_mapped_leaves_a_parameter_out():
    tx = sharding.zero1_mapped(RMS(), "x")
    params = {"used": jnp.ones((8, 16)), "unused": jnp.ones((8, 16))}
    state = wait(jax.pmap(tx.init, axis_name="x"))(params)
    update = jax.pmap(lambda g, s: tx.update({"used": g, "unused": None}, s), axis_name="x")
    updates, new = wait(update)(params["used"], state)
    assert updates["unused"] is None
    np.testing.assert_array_equal(state.nu["unused"], new.nu["unused"])
    assert np.all(np.asarray(new.nu["used"]) != state.nu["used"])


DTYPES = ["bfloat16", "float16", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapped", [False, True])
def test_zero1_of_other_dtypes(dtype, mapped):
    """Updates keep the dtype of the gradients; the state is in float32 all the same."""
    mesh, plain = mesh_of(8), RMS()
    params = jnp.asarray(np.arange(1, 33), dtype)
    state = plain.init(params)
    want, want_state = jax.jit(plain.update)(params, state)
    if mapped:
        tx = sharding.zero1_mapped(plain, "x")
        copies = jnp.stack([params] * 8)
        updates, got = wait(jax.pmap(tx.update, axis_name="x"))(
            copies, wait(jax.pmap(tx.init, axis_name="x"))(copies)
        )
        updates, got = updates[3], jax.tree.map(lambda part: part.reshape(-1), got)
        got = got._replace(count=got.count[0])
    else:
        tx = sharding.zero1(plain, mesh, "x")
        params = jax.device_put(params, NamedSharding(mesh, P()))
        updates, got = wait(jax.jit(tx.update))(params, wait(jax.jit(tx.init))(params))
    assert updates.dtype == want.dtype == params.dtype
    np.testing.assert_allclose(updates, want, 1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want_state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, 1e-6)


def test_a_forgotten_pmean_cannot_be_noticed():
    """As the README warns: each device goes its own way, without an error."""
    tx = rmsprop(0.1)
    update = wait(jax.pmap(lambda scale, state: tx.update(scale * jnp.arange(4.0), state)))
    state = wait(jax.pmap(tx.init))(jnp.ones((8, 4)))
    _, state = update(jnp.arange(1.0, 9.0), state)
    assert len(np.unique(np.asarray(state.nu), axis=0)) == 8


def test_check_vma_is_refused_where_gradients_would_be_summed_twice():
    mesh, tx = mesh_of(8), sharding.zero1_mapped(rmsprop(0.1), "x")
    params = jnp.ones(16)
    specs = jax.tree.map(
        lambda place: place.spec, sharding.state_sharding(tx, params, NamedSharding(mesh, P()))
    )
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
    state = wait(jax.jit(init))(params)
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=(P(), specs), out_specs=(P("x"), specs))
    with pytest.raises(ValueError, match=r"needs jax.shard_map\(..., check_vma=False\)"):
        jax.jit(update)(params, state)


def test_an_axis_that_is_not_mapped_is_named_by_jax():
    tx = sharding.zero1_mapped(rmsprop(0.1), "rows")
    with pytest.raises(NameError, match="unbound axis name: rows"):
        tx.init(jnp.ones(8))


MESH = mesh_of(8)
ALL = NamedSharding(MESH, P())
MIXED = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit))
ZERO = sharding.zero1(rmsprop(0.1), MESH, "x")
CAUTIOUS = optax.chain(rmsprop(0.1, momentum=0.9, cautious=True))
REFUSED = [
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


def test_blocks_that_do_not_divide_are_refused_by_state_sharding_and_cut_otherwise_by_zero1():
    """Four blocks on an axis of eight parts would be cut, so zero1 takes another axis."""
    params = {"w": jnp.ones((8, 40)), "v": jnp.ones((2, 40))}
    tx = rmsprop(0.1, storage=low_memory.q8(16, 0))
    place = NamedSharding(MESH, P(None, "x"))
    with pytest.raises(
        ValueError, match=r"'[vw]' has one number a block, of shape \(\d, 4\).*choose a block"
    ):
        sharding.state_sharding(tx, params, place)
    tx = sharding.zero1(tx, MESH, "x")
    state = wait(jax.jit(tx.init))(jax.device_put(params, ALL))
    assert state.nu.codes["w"].sharding.spec == P("x")
    assert state.nu.codes["v"].is_fully_replicated


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


@pytest.mark.parametrize("storage", [None, low_memory.q8(1, 0)], ids=str)
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


def test_what_fills_the_place_of_exponents_may_lie_anywhere():
    """Of a parameter that is exempt, however its last axis is sharded."""
    params, place = {"w": jnp.ones((64, 776))}, NamedSharding(MESH, P(None, "x"))
    tx = rmsprop(0.1, storage=low_memory.q8(256, exempt=lambda path: True))
    placed = sharding.state_sharding(tx, params, place)
    assert placed.nu.codes["w"] == place
    state = wait(jax.jit(tx.init, out_shardings=placed))(jax.device_put(params, place))
    assert_placed(state, placed)
    assert sharding.zero1(tx, MESH, "x").init(params).nu.codes["w"].sharding.spec == P("x")


@pytest.mark.parametrize(
    ("wrap", "with_params"),
    [
        (optax.flatten, False),
        (optax.flatten, True),
        (lambda tx: optax.chain(tx, optax.adafactor(0.1, 4)), True),
    ],
)
def test_what_belongs_to_no_parameter_stays_everywhere(wrap, with_params):
    """So that a step takes what it has made: the second needs no program of its own."""
    tx = sharding.zero1(wrap(rmsprop(0.1)), MESH, "x")
    params = jax.device_put({"a": jnp.ones((16, 8)), "b": jnp.ones(8)}, ALL)
    state = wait(jax.jit(tx.init))(params)
    given = (params,) if with_params else ()
    program = jax.jit(tx.update).lower(params, state, *given).compile()
    for _ in range(2):
        _, state = wait(program)(params, state, *given)


def test_extra_arguments_reach_those_who_take_them_and_no_others():
    tx = optax.chain(
        sharding.zero1(optax.scale_by_adam(), MESH, "x"), optax.contrib.reduce_on_plateau()
    )
    params = jax.device_put({"w": jnp.ones(8)}, ALL)
    tx.update(params, tx.init(params), params, value=1.0)
    inside = optax.chain(rmsprop(0.1), optax.contrib.reduce_on_plateau(patience=1))
    tx = sharding.zero1(inside, MESH, "x")
    _, state = tx.update(params, tx.init(params), params, value=jnp.array(1.0))
    assert state[1].best_value == 1.0
    tx = sharding.zero1(optax.MultiSteps(inside, 1), MESH, "x")
    _, state = tx.update(params, tx.init(params), params, value=jnp.array(1.0))
    assert state.inner_opt_state[1].best_value == 1.0


def test_shardings_of_zero1_may_be_spelled_in_other_ways():
    for spec in (P(), P(None), P(None, None)):
        placed = sharding.state_sharding(ZERO, jnp.ones((16, 4)), NamedSharding(MESH, spec))
        assert placed.nu.spec == P("x")


def test_python_numbers_are_parameters_too():
    for tx in (rmsprop(0.1), ZERO, sharding.zero1_mapped(rmsprop(0.1), "x")):
        assert sharding.state_sharding(tx, {"a": 1.0}, ALL).nu == {"a": ALL}


def test_empty_arrays_are_not_split():
    params = jax.device_put({"w": jnp.ones((0, 8))}, ALL)
    state = wait(jax.jit(ZERO.init))(params)
    assert_placed(state, sharding.state_sharding(ZERO, params, ALL))

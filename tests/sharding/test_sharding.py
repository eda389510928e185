"""The same steps on many devices as on one, however parameters, state and data are spread."""

import functools
import itertools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import assert_placed, bytes_held, collectives, mesh_of, wait
from rmsprop_jax import dialects, low_memory, rmsprop, sharding

SHAPES = {"kernel": (16, 24), "conv": (3, 5, 8), "bias": (24,), "odd": (7,), "scalar": ()}
SPLIT = {"kernel": P("x"), "conv": P(None, None, "x"), "bias": P("x"), "odd": P(), "scalar": P()}
DEVICES, STEPS, RATE = 8, 4, 0.01
FORMS = {
    "plain": lambda **kw: rmsprop(RATE, **kw),
    "momentum": lambda **kw: rmsprop(RATE, momentum=0.9, nesterov=True, **kw),
    "centered": lambda **kw: rmsprop(RATE, eps=1e-4, centered=True, momentum=0.9, **kw),
    "weight decay": lambda **kw: rmsprop(RATE, weight_decay=0.1, bias_correction=True, **kw),
    "pytorch": lambda **kw: dialects.pytorch(RATE, weight_decay=0.1, momentum=0.9, **kw),
    "keras": lambda **kw: dialects.keras(RATE, momentum=0.9, weight_decay=0.1, **kw),
    "tensorflow 1": lambda **kw: dialects.tensorflow_v1(RATE, momentum=0.9, **kw),
    "schedule": lambda **kw: rmsprop(optax.linear_schedule(RATE, 0, 10), momentum=0.9, **kw),
    "in a chain": lambda **kw: optax.chain(
        optax.clip(0.5), rmsprop(-1.0, **kw), optax.scale(-RATE)
    ),
}
# What looks at more than one number at a time.
WIDE = {
    "cautious": lambda **kw: rmsprop(RATE, momentum=0.9, cautious=True, **kw),
    "clipped": lambda **kw: optax.chain(optax.clip_by_global_norm(0.1), rmsprop(RATE, **kw)),
}
SOME = ["plain", "centered", "clipped"]
BOTH = [AxisType.Auto, AxisType.Explicit]
each_axis_type = pytest.mark.parametrize("axis_type", BOTH, ids=lambda kind: kind.name)


@functools.cache
def initial():
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(s).astype(np.float32) / 4 for k, s in SHAPES.items()}


@functools.cache
def batches():
    """Sixteen rows a step, for each of the parameters: whole numbers, times powers of two."""
    rng = np.random.default_rng(1)
    scales = {k: np.ldexp(1, rng.integers(-6, 6, s)) for k, s in SHAPES.items()}
    return [
        {k: np.float32(rng.integers(-9, 10, (16, *v.shape)) * v) for k, v in scales.items()}
        for _ in range(STEPS)
    ]


def loss(params, batch):
    """Its gradient is the mean of the batch, in whichever order that is summed."""
    products = jax.tree.map(lambda p, rows: jnp.sum(p * rows, range(1, rows.ndim)), params, batch)
    return jnp.mean(sum(jax.tree.leaves(products)))


def step_of(tx, reduce=lambda grads: grads, gather=lambda params: params):
    def step(params, state, x):
        grads = reduce(jax.grad(lambda params: loss(gather(params), x))(params))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def alone(form):
    """Parameters and state after the steps, on one device."""
    tx = (FORMS | WIDE)[form]()
    params, step = jax.tree.map(jnp.asarray, initial()), jax.jit(step_of(tx))
    state = tx.init(params)
    for x in batches():
        params, state = step(params, state, x)
    return jax.device_get((params, state))


def assert_equal(got, want):
    """To 1e-6, and to 1e-6 of what is larger than 1: gradients are the same, programs are not."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, 1e-6, 1e-6, err_msg=jax.tree_util.keystr(path))


def places(mesh, specs):
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def placed(tree, shardings):
    """Copies: a buffer of the first device could be shared, and donated."""
    return jax.tree.map(jnp.copy, jax.device_put(tree, shardings))


def train(step, params, state, mesh):
    """The compiled step, which takes no arguments placed in another way, and where it led."""
    program = None
    for x in batches():
        x = jax.device_put(x, NamedSharding(mesh, P("x")))
        if program is None:
            program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()
        before = jax.tree.leaves((params, state))
        params, state = wait(program)(params, state, x)
        assert all(array.is_deleted() for array in before)
    return program, params, state


def assert_replicated(tree):
    """Every device has the same bits."""
    for array in jax.tree.leaves(tree):
        assert array.is_fully_replicated
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, array)


@pytest.mark.parametrize("form", SOME)
@each_axis_type
def test_data_parallel(form, axis_type):
    mesh = mesh_of(DEVICES, axis_type=axis_type)
    tx, params = (FORMS | WIDE)[form](), placed(initial(), NamedSharding(mesh, P()))
    state = wait(jax.jit(tx.init))(params)
    program, params, state = train(step_of(tx), params, state, mesh)
    assert_equal(jax.device_get((params, state)), alone(form))
    assert_replicated((params, state))
    assert set(collectives(program)) == {"all-reduce"}


@pytest.mark.parametrize(
    ("form", "axis_type"),
    [*((form, AxisType.Auto) for form in FORMS | WIDE), ("centered", AxisType.Explicit)],
)
def test_fully_sharded(form, axis_type):
    """Under Explicit meshes, parameters are gathered for the loss by hand."""
    mesh = mesh_of(DEVICES, axis_type=axis_type)
    tx, where = (FORMS | WIDE)[form](), places(mesh, SPLIT)
    params = placed(initial(), where)
    wanted = sharding.state_sharding(tx, params, where)
    state = wait(jax.jit(tx.init, out_shardings=wanted))(params)
    gather = functools.partial(jax.tree.map, lambda p: jax.reshard(p, NamedSharding(mesh, P())))
    step = step_of(tx, gather=gather) if axis_type is AxisType.Explicit else step_of(tx)
    _, params, state = train(step, params, state, mesh)
    assert_equal(jax.device_get((params, state)), alone(form))
    assert_placed((params, state), (where, wanted))


@pytest.mark.parametrize("form", FORMS | WIDE)
@each_axis_type
def test_zero1(form, axis_type):
    mesh = mesh_of(DEVICES, axis_type=axis_type)
    everywhere, plain = NamedSharding(mesh, P()), (FORMS | WIDE)[form]()
    tx, params = sharding.zero1(plain, mesh, "x"), placed(initial(), everywhere)
    wanted = sharding.state_sharding(tx, params, everywhere)
    assert wanted == sharding.state_sharding(plain, params, places(mesh, SPLIT))
    state = wait(jax.jit(tx.init))(params)
    assert_placed(state, wanted)
    program, params, state = train(step_of(tx), params, state, mesh)
    assert_equal(jax.device_get((params, state)), alone(form))
    assert_replicated(params)
    assert_placed(state, wanted)
    assert set(collectives(program)) <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert 1 <= collectives(program)["all-gather"] <= 3  # of the leaves that are split


def pmapped(tx, reduce):
    def run(plain):
        copies = jax.tree.map(lambda p: jnp.stack([p] * DEVICES), initial())
        params = placed(copies, NamedSharding(mesh_of(DEVICES), P("x")))
        state = wait(jax.pmap(tx.init, axis_name="x"))(params)
        traces = []
        step = step_of(tx, lambda grads: traces.append(1) or reduce(grads))
        step = jax.pmap(step, axis_name="x", donate_argnums=(0, 1))
        for x in batches():
            parts = jax.tree.map(lambda rows: rows.reshape(DEVICES, -1, *rows.shape[1:]), x)
            params, state = wait(step)(params, state, parts)
        assert len(traces) == 1
        for array in jax.tree.leaves(params):
            np.testing.assert_array_equal(array, np.broadcast_to(array[:1], array.shape))
        return jax.tree.map(lambda array: array[0], params), state

    return run


def mean(grads):
    return lax.pmean(grads, "x")


def same(grads):
    return grads


@pytest.mark.parametrize("form", SOME)
def test_pmap(form):
    tx = (FORMS | WIDE)[form]()
    params, state = pmapped(tx, mean)(tx)
    for array in jax.tree.leaves(state):
        np.testing.assert_array_equal(array, np.broadcast_to(array[:1], array.shape))
    assert_equal((params, jax.tree.map(lambda array: array[0], state)), alone(form))


def together(parts, spec):
    """What pmap's devices hold, as one array."""
    if "x" not in spec:
        np.testing.assert_array_equal(parts, np.broadcast_to(parts[:1], parts.shape))
        return parts[0]
    return np.concatenate(list(parts), axis=list(spec).index("x"))


@pytest.mark.parametrize("form", ["plain", "centered", "weight decay", "in a chain"])
def test_zero1_in_pmap(form):
    plain = FORMS[form]()
    params, state = pmapped(sharding.zero1_mapped(plain, "x"), same)(plain)
    wanted = sharding.state_sharding(plain, initial(), places(mesh_of(DEVICES), SPLIT))
    state = jax.tree.map(lambda parts, place: together(parts, place.spec), state, wanted)
    assert_equal((params, state), alone(form))


@pytest.mark.parametrize("form", SOME)
def test_shard_map(form):
    mesh, tx = mesh_of(DEVICES), (FORMS | WIDE)[form]()
    params = placed(initial(), NamedSharding(mesh, P()))
    step = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=P())
    step = step(step_of(tx, mean), check_vma=False)
    program, params, state = train(step, params, wait(jax.jit(tx.init))(params), mesh)
    assert_equal(jax.device_get((params, state)), alone(form))
    assert_replicated((params, state))
    assert set(collectives(program)) == {"all-reduce"}


@pytest.mark.parametrize(
    ("form", "reduce", "axis_type"),
    [
        *((form, same, AxisType.Auto) for form in FORMS),
        ("centered", same, AxisType.Explicit),
        ("centered", mean, AxisType.Auto),  # in vain, but right
    ],
)
def test_zero1_in_shard_map(form, axis_type, reduce):
    """Its state is put together to that of one device, and its parts are those of zero1."""
    mesh, plain = mesh_of(DEVICES, axis_type=axis_type), FORMS[form]()
    everywhere, tx = NamedSharding(mesh, P()), sharding.zero1_mapped(plain, "x")
    params = placed(initial(), everywhere)
    wanted = sharding.state_sharding(tx, params, everywhere)
    assert wanted == sharding.state_sharding(sharding.zero1(plain, mesh, "x"), params, everywhere)
    specs = jax.tree.map(lambda place: place.spec, wanted)
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    state = wait(jax.jit(mapped(tx.init, in_specs=P(), out_specs=specs)))(params)
    step = mapped(step_of(tx, reduce), in_specs=(P(), specs, P("x")), out_specs=(P(), specs))
    program, params, state = train(step, params, state, mesh)
    assert_equal(jax.device_get((params, state)), alone(form))
    assert_replicated(params)
    assert_placed(state, wanted)
    kinds = {"reduce-scatter", "all-gather", "all-reduce"}  # the last for what is not split
    assert set(collectives(program)) == kinds


# Two axes of a mesh: data along x, parameters along y, or along both.
TWO_D = {
    "kernel": P(None, "y"),
    "conv": P(None, None, "y"),
    "bias": P("y"),
    "odd": P(),
    "scalar": P(),
}
TWO_D_SPLIT = {
    "kernel": P("x", "y"),
    "conv": P(None, None, ("y", "x")),
    "bias": P(("y", "x")),
    "odd": P(),
    "scalar": P(),
}


@pytest.mark.parametrize("form", ["centered", "pytorch", "cautious"])
@pytest.mark.parametrize("way", ["model", "fsdp", "zero1", "zero1 over both"])
def test_two_axes(form, way):
    mesh, tx = mesh_of(4, 2), (FORMS | WIDE)[form]()
    where = places(mesh, {"model": TWO_D, "zero1": TWO_D, "fsdp": TWO_D_SPLIT}.get(way, {}))
    where = where or NamedSharding(mesh, P())
    params = placed(initial(), where)
    wanted = sharding.state_sharding(tx, params, where)
    if way.startswith("zero1"):
        axes = "x" if way == "zero1" else ("x", "y")
        tx = sharding.zero1(tx, mesh, axes, where)
        wanted = sharding.state_sharding(tx, params, where)
        assert wanted != sharding.state_sharding((FORMS | WIDE)[form](), params, where)
    state = wait(jax.jit(tx.init))(params)
    if way != "zero1 over both":
        state = jax.device_put(state, wanted)
    assert_placed(state, wanted)
    split = places(mesh, TWO_D_SPLIT)
    if way == "zero1":
        assert wanted == sharding.state_sharding((FORMS | WIDE)[form](), params, split)
    whole = NamedSharding(mesh, P())
    where = where if isinstance(where, dict) else dict.fromkeys(SHAPES, whole)
    plain = step_of(tx)

    def step(params, state, x):  # so that XLA does not choose other places for parameters
        params, state = plain(params, state, x)
        return lax.with_sharding_constraint(params, where), state

    _, params, state = train(step, params, state, mesh)
    assert_equal(jax.device_get((params, state)), alone(form))
    assert_placed((params, state), (where, wanted))


@pytest.mark.parametrize("storage", [None, low_memory.bfloat16(), low_memory.q8(1, 0)], ids=str)
@pytest.mark.parametrize(
    ("way", "jit"),
    [*itertools.product(["whole", "fsdp", "zero1"], [False, True]), ("zero1_mapped", True)],
)
def test_bytes_on_each_device(way, storage, jit):
    """An eighth, of what an eighth can be taken of."""
    mesh = mesh_of(DEVICES)
    everywhere, params = NamedSharding(mesh, P()), initial()
    tx = rmsprop(RATE, momentum=0.9, storage=storage)
    full = bytes_held(tx.init(jax.tree.map(jnp.asarray, params))).total()
    rest = {name: jnp.asarray(params[name]) for name in ("odd", "scalar")}
    fixed = bytes_held(tx.init(rest)).total()
    if isinstance(storage, type(low_memory.q8())):
        fixed += 2 * 3 * 4  # a scale for each of two slots of the others
    want = full if way == "whole" else fixed + (full - fixed) // DEVICES
    params = jax.device_put(params, places(mesh, SPLIT) if way == "fsdp" else everywhere)
    if way == "zero1":
        tx = sharding.zero1(tx, mesh, "x")
    init = tx.init
    if way == "zero1_mapped":
        tx = sharding.zero1_mapped(tx, "x")
        wanted = sharding.state_sharding(tx, params, everywhere)
        specs = jax.tree.map(lambda place: place.spec, wanted)
        init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False)
    state = wait(jax.jit(init) if jit else init)(params)
    held = bytes_held(state)
    if not jit and way in ("whole", "fsdp"):  # the count is on the first device
        held.update(dict.fromkeys(jax.devices()[1:], 4))
    assert set(held.values()) == {want}


@pytest.mark.parametrize("form", FORMS)
def test_the_update_of_a_sharded_state_needs_no_communication(form):
    mesh, tx = mesh_of(DEVICES), FORMS[form]()
    where = places(mesh, SPLIT)
    params = jax.device_put(initial(), where)
    state = wait(jax.jit(tx.init))(params)
    program = jax.jit(tx.update).lower(params, state, params).compile()
    assert not collectives(program)


@pytest.mark.parametrize("form", ["plain", "centered"])
def test_zero1_gathers_the_updates_and_nothing_else(form):
    """Of gradients that every device has; the step needs no memory but that of the updates."""
    mesh = mesh_of(DEVICES)
    where = NamedSharding(mesh, P())
    params = jax.device_put(jnp.ones((64, 512)), where)
    tx = sharding.zero1(FORMS[form](), mesh, "x")
    state = wait(jax.jit(tx.init))(params)
    program = jax.jit(tx.update).lower(params, state, params).compile()
    assert collectives(program) == {"all-gather": 1}
    assert program.memory_analysis().temp_size_in_bytes <= params.nbytes / DEVICES + 4096

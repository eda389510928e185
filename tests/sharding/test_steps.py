"""Steps on many devices equal those on one, however parameters, state and data are sharded."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import assert_moved, assert_placed, collectives, mesh_of, side_by_side, wait
from rmsprop_jax import dialects, rmsprop, sharding

SHAPES = {"kernel": (16, 24), "conv": (3, 5, 8), "bias": (24,), "odd": (7,), "scalar": ()}
SPLIT = {"kernel": P("x"), "conv": P(None, None, "x"), "bias": P("x"), "odd": P(), "scalar": P()}
PARTED = 3  # of them
DEVICES, STEPS, RATE = 8, 4, 0.01
FORMS = {
    "plain": rmsprop(RATE),
    "momentum": rmsprop(RATE, momentum=0.9, nesterov=True),
    "centered": rmsprop(RATE, eps=1e-4, centered=True, momentum=0.9),
    "weight decay": rmsprop(RATE, weight_decay=0.1, bias_correction=True),
    "pytorch": dialects.pytorch(RATE, weight_decay=0.1, momentum=0.9),
    "keras": dialects.keras(RATE, momentum=0.9, weight_decay=0.1),
    "tensorflow 1": dialects.tensorflow_v1(RATE, momentum=0.9),
    "schedule": rmsprop(optax.linear_schedule(RATE, 0, 10), momentum=0.9),
    "in a chain": optax.chain(optax.clip(0.5), rmsprop(-1.0), optax.scale(-RATE)),
}
# What looks at more than one number at a time.
WIDE = {
    "cautious": rmsprop(RATE, momentum=0.9, cautious=True),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), rmsprop(RATE)),
}
ALL = FORMS | WIDE
SOME = {form: ALL[form] for form in ("plain", "centered", "clipped")}
OTHERS = {form: tx for form, tx in ALL.items() if form not in SOME}
CENTERED = {"centered": FORMS["centered"]}
each_axis_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name
)


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
    products = jax.tree.map(
        lambda p, rows: jnp.sum(p[None] * rows, range(1, rows.ndim)), params, batch
    )
    return jnp.mean(sum(jax.tree.leaves(products)))


def same(tree):
    return tree


def mean(grads):
    return lax.pmean(grads, "x")


def step_of(txs, reduce=same, gather=same):
    """One step of several transformations, each with parameters of its own."""
    tx = side_by_side(txs)

    def losses(params, x):
        return sum(loss(of_one, x) for of_one in gather(params).values())

    def step(params, state, x):
        grads = reduce(jax.grad(losses)(params, x))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def alone():
    """Parameters and state of each form after the steps, on one device."""
    params = jax.tree.map(jnp.asarray, dict.fromkeys(ALL, initial()))
    state, step = jax.jit(side_by_side(ALL).init)(params), jax.jit(step_of(ALL))
    for x in batches():
        params, state = step(params, state, x)
    assert_moved(state)
    return jax.device_get({form: (params[form], state[form]) for form in ALL})


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


def wanted_of(txs, where):
    return {form: sharding.state_sharding(tx, initial(), where) for form, tx in txs.items()}


def placed(forms, where):
    """Parameters for each form, in buffers of their own, so that they can be donated."""
    return jax.device_put(
        dict.fromkeys(forms, initial()), dict.fromkeys(forms, where), may_alias=False
    )


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


def check(subtests, params, state, where, wanted):
    """Parameters and state are those on one device, and where they were; copies are equal."""
    for form in params:
        with subtests.test(form=form):
            run = params[form], state[form]
            assert_equal(jax.device_get(run), alone()[form])
            assert_placed(run, jax.tree.broadcast((where, wanted[form]), run))
            for array in jax.tree.leaves(run):
                if array.is_fully_replicated:
                    for shard in array.addressable_shards:
                        np.testing.assert_array_equal(shard.data, array)


@each_axis_type
def test_data_parallel(axis_type, subtests):
    mesh = mesh_of(DEVICES, axis_type=axis_type)
    everywhere = NamedSharding(mesh, P())
    params = placed(SOME, everywhere)
    state = wait(jax.jit(side_by_side(SOME).init))(params)
    program, params, state = train(step_of(SOME), params, state, mesh)
    check(subtests, params, state, everywhere, dict.fromkeys(SOME, everywhere))
    assert set(collectives(program)) == {"all-reduce"}


@pytest.mark.parametrize(
    ("axis_type", "txs"),
    [(AxisType.Auto, ALL), (AxisType.Explicit, CENTERED)],
    ids=["Auto", "Explicit"],
)
def test_fully_sharded(axis_type, txs, subtests):
    """Under Explicit meshes, parameters are gathered for the loss by hand."""
    mesh = mesh_of(DEVICES, axis_type=axis_type)
    where = places(mesh, SPLIT)
    params, wanted = placed(txs, where), wanted_of(txs, where)
    state = wait(jax.jit(side_by_side(txs).init, out_shardings=wanted))(params)
    gather = same
    if axis_type is AxisType.Explicit:
        gather = functools.partial(jax.tree.map, lambda p: jax.reshard(p, NamedSharding(mesh, P())))
    _, params, state = train(step_of(txs, gather=gather), params, state, mesh)
    check(subtests, params, state, where, wanted)


@pytest.mark.parametrize(
    ("axis_type", "plain"),
    [
        (AxisType.Auto, ALL),
        (AxisType.Explicit, SOME),
        pytest.param(AxisType.Explicit, OTHERS, marks=pytest.mark.slow),
    ],
    ids=["Auto", "Explicit", "Explicit, others"],
)
def test_zero1(axis_type, plain, subtests):
    mesh = mesh_of(DEVICES, axis_type=axis_type)
    everywhere = NamedSharding(mesh, P())
    txs = {form: sharding.zero1(tx, mesh, "x") for form, tx in plain.items()}
    params, wanted = placed(txs, everywhere), wanted_of(txs, everywhere)
    assert wanted == wanted_of(plain, places(mesh, SPLIT))
    state = wait(jax.jit(side_by_side(txs).init))(params)
    assert_placed(state, wanted)
    program, params, state = train(step_of(txs), params, state, mesh)
    check(subtests, params, state, everywhere, wanted)
    found = collectives(program)
    assert set(found) <= {"all-reduce", "reduce-scatter", "all-gather"}
    counts = 2 * PARTED if "cautious" in txs else 0  # two numbers a shard, on CPUs
    assert 1 <= found["all-gather"] <= PARTED * len(txs) + counts


def pmapped(txs, reduce):
    """Parameters and states of all devices; of the parameters those of one, since all are equal."""
    copies = jax.tree.map(lambda p: np.stack([p] * DEVICES), dict.fromkeys(txs, initial()))
    params = jax.device_put(copies, NamedSharding(mesh_of(DEVICES), P("x")), may_alias=False)
    state = wait(jax.pmap(side_by_side(txs).init, axis_name="x"))(params)
    traces = []
    step = step_of(txs, lambda grads: traces.append(1) or reduce(grads))
    step = jax.pmap(step, axis_name="x", donate_argnums=(0, 1))
    for x in batches():
        parts = jax.tree.map(lambda rows: rows.reshape(DEVICES, -1, *rows.shape[1:]), x)
        params, state = wait(step)(params, state, parts)
    assert len(traces) == 1
    return jax.tree.map(the_same_on_all, params), jax.device_get(state)


def the_same_on_all(parts):
    parts = np.asarray(parts)
    np.testing.assert_array_equal(parts, np.broadcast_to(parts[:1], parts.shape))
    return parts[0]


def test_pmap(subtests):
    params, state = pmapped(SOME, mean)
    for form in SOME:
        with subtests.test(form=form):
            assert_equal((params[form], jax.tree.map(the_same_on_all, state[form])), alone()[form])


def together(parts, place):
    """What pmap's devices hold, as one array."""
    if "x" not in place.spec:
        return the_same_on_all(parts)
    return np.concatenate(list(parts), axis=list(place.spec).index("x"))


def test_zero1_in_pmap(subtests):
    plain = {form: FORMS[form] for form in ("plain", "centered", "weight decay", "in a chain")}
    txs = {form: sharding.zero1_mapped(tx, "x") for form, tx in plain.items()}
    params, state = pmapped(txs, same)
    for form, wanted in wanted_of(plain, places(mesh_of(DEVICES), SPLIT)).items():
        with subtests.test(form=form):
            whole = jax.tree.map(together, state[form], wanted)
            assert_equal((params[form], whole), alone()[form])


def test_shard_map(subtests):
    mesh = mesh_of(DEVICES)
    everywhere = NamedSharding(mesh, P())
    params = placed(SOME, everywhere)
    step = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=P())
    step = step(step_of(SOME, mean), check_vma=False)
    state = wait(jax.jit(side_by_side(SOME).init))(params)
    program, params, state = train(step, params, state, mesh)
    check(subtests, params, state, everywhere, dict.fromkeys(SOME, everywhere))
    assert set(collectives(program)) == {"all-reduce"}


@pytest.mark.parametrize(
    ("axis_type", "reduce", "plain"),
    [
        (AxisType.Auto, same, FORMS),
        (AxisType.Explicit, same, CENTERED),
        (AxisType.Auto, mean, CENTERED),  # in vain, but right
    ],
    ids=["Auto", "Explicit", "of a mean"],
)
def test_zero1_in_shard_map(axis_type, reduce, plain, subtests):
    """Its state is put together to that of one device, and its parts are those of zero1."""
    mesh = mesh_of(DEVICES, axis_type=axis_type)
    everywhere = NamedSharding(mesh, P())
    txs = {form: sharding.zero1_mapped(tx, "x") for form, tx in plain.items()}
    params, wanted = placed(txs, everywhere), wanted_of(txs, everywhere)
    zero1 = {form: sharding.zero1(tx, mesh, "x") for form, tx in plain.items()}
    assert wanted == wanted_of(zero1, everywhere)
    specs = jax.tree.map(lambda place: place.spec, wanted)
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    state = wait(jax.jit(mapped(side_by_side(txs).init, in_specs=P(), out_specs=specs)))(params)
    step = mapped(step_of(txs, reduce), in_specs=(P(), specs, P("x")), out_specs=(P(), specs))
    x = jax.device_put(batches()[0], NamedSharding(mesh, P("x")))
    asked = jax.jit(step).lower(params, state, x).as_text()
    for kind in ("reduce_scatter", "all_gather"):
        assert asked.count(f"stablehlo.{kind}") == PARTED * len(txs)
    program, params, state = train(step, params, state, mesh)
    check(subtests, params, state, everywhere, wanted)
    kinds = {"reduce-scatter", "all-gather", "all-reduce"}  # the last for what is not split
    assert set(collectives(program)) == kinds


# Two axes of a mesh: data along x, parameters along y, or along both.
WHOLE = dict.fromkeys(SHAPES, P())
TWO_D = WHOLE | {"kernel": P(None, "y"), "conv": P(None, None, "y"), "bias": P("y")}
TWO_D_SPLIT = WHOLE | {
    "kernel": P("x", "y"),
    "conv": P(None, None, ("y", "x")),
    "bias": P(("y", "x")),
}
WAYS = {"model": TWO_D, "fsdp": TWO_D_SPLIT, "zero1": TWO_D, "zero1 over both": WHOLE}


@pytest.mark.parametrize("way", WAYS)
def test_two_axes(way, subtests):
    mesh = mesh_of(4, 2)
    plain = {form: ALL[form] for form in ("centered", "pytorch", "cautious")}
    where = places(mesh, WAYS[way])
    params, txs = placed(plain, where), plain
    wanted = wanted_of(plain, where)
    if way.startswith("zero1"):
        axes = "x" if way == "zero1" else ("x", "y")
        txs = {form: sharding.zero1(tx, mesh, axes, where) for form, tx in plain.items()}
        wanted = wanted_of(txs, where)
        for form, unsplit in wanted_of(plain, where).items():
            assert wanted[form] != unsplit
    state = wait(jax.jit(side_by_side(txs).init))(params)
    if way != "zero1 over both":
        state = jax.device_put(state, wanted)
    assert_placed(state, wanted)
    if way == "zero1":
        assert wanted == wanted_of(plain, places(mesh, TWO_D_SPLIT))
    unconstrained = step_of(txs)

    def step(params, state, x):  # so that XLA does not choose other places for parameters
        params, state = unconstrained(params, state, x)
        return lax.with_sharding_constraint(params, dict.fromkeys(txs, where)), state

    _, params, state = train(step, params, state, mesh)
    check(subtests, params, state, where, wanted)


def test_the_update_of_a_sharded_state_needs_no_communication():
    tx, params = side_by_side(FORMS), placed(FORMS, places(mesh_of(DEVICES), SPLIT))
    state = wait(jax.jit(tx.init))(params)
    assert not collectives(jax.jit(tx.update).lower(params, state, params).compile())

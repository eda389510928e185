"""States of few bits on many devices: placed like the parameters, with the same bits as on one."""

import contextlib
import functools
import itertools
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import assert_same, collectives, mesh_of, wait
from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._storage import Joined

STORAGES = {
    "q8": low_memory.q8(block=16, min_size=100, exempt=lambda path: path == "exempt"),
    "bfloat16": low_memory.bfloat16(exempt=lambda path: path == "small"),
}
# The shape, dtype and shards of each leaf, on a mesh of 4 x 2; "small" is held in float32.
LEAVES = {
    "vector": ((256,), "float32", P("x")),
    "rows": ((8, 48), "float32", P("x")),
    "columns": ((3, 128), "bfloat16", P(None, "x")),
    "both": ((2, 4, 64), "float32", P(None, "y", "x")),
    "replicated": ((4, 34), "float32", P()),
    "small": ((8, 2), "bfloat16", P("x", "y")),
    "scalar": ((), "float32", P()),
}
FORMS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "centered": {"centered": True, "momentum": 0.9},
    "weight decay": {"weight_decay": 0.1, "bias_correction": True},
    "decoupled weight decay": {
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "momentum": 0.9,
        "lr_in_momentum": False,
    },
}
AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
MODES = list(itertools.product(AXIS_TYPES, [False, True], [False, True]))


def name_of(value):
    return getattr(value, "name", str(value))


modes = functools.partial(pytest.mark.parametrize, ids=name_of)
each_axis_type = pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=name_of)
each_storage = pytest.mark.parametrize("storage", STORAGES)


def values(t, leaves=LEAVES):
    """The parameters if t is 0, or the gradients of step t."""
    rng = np.random.default_rng(t)
    return {
        name: jnp.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape), dtype)
        for name, (shape, dtype, _) in leaves.items()
    }


def shardings(mesh, leaves=LEAVES):
    return {name: NamedSharding(mesh, spec) for name, (*_, spec) in leaves.items()}


def arrays(state):
    """The arrays of each field, with the names of their part of it and of their leaf.

    Scales are of all leaves, and their leaf has no name.
    """
    for field in (state.nu, state.mu, state.trace):
        parts = field._asdict() if isinstance(field, Joined) else {"array": field}
        for part, tree in parts.items():
            for path, array in jax.tree_util.tree_leaves_with_path(tree):
                yield part, jax.tree_util.keystr(path, simple=True, separator="/"), array


def assert_placed_like(state, wanted):
    mesh = next(iter(wanted.values())).mesh
    for part, name, array in arrays(state):
        sharding = NamedSharding(mesh, P()) if part == "scales" else wanted[name]
        got = array.sharding
        assert got.is_equivalent_to(sharding, array.ndim), (part, name, got)


@modes(("axis_type", "use_set_mesh", "jit"), MODES)
@each_storage
def test_init_places_the_state_like_the_parameters(storage, axis_type, use_set_mesh, jit):
    """NaN parameters: the place must not come from arithmetic with their values."""
    mesh = mesh_of(4, 2, axis_type=axis_type)
    nans = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), values(0))
    params = jax.device_put(nans, shardings(mesh))
    options = {"initial_scale": 0.5, "centered": True, "momentum": 0.9}
    tx = rmsprop(0.1, **options, storage=STORAGES[storage])
    with jax.set_mesh(mesh) if use_set_mesh else contextlib.nullcontext():
        state = wait(jax.jit(tx.init) if jit else tx.init)(params)
    assert_placed_like(state, shardings(mesh))
    assert_same(jax.device_get(state), jax.device_get(tx.init(nans)))


# Leaves of which nothing is in 8 bits, and fewer exponents than numbers where they are many.
MORE = LEAVES | {
    "exempt": ((2, 4096), "float32", P("y", "x")),
    "complex": ((8, 6), "complex64", P("x", "y")),
}


@each_axis_type
@each_storage
def test_every_array_but_the_scales_can_be_given_the_sharding_of_its_parameter(storage, axis_type):
    """As jit, device_put and restored checkpoints are told where a state is to be."""
    mesh = mesh_of(4, 2, axis_type=axis_type)
    wanted, replicated = shardings(mesh, MORE), NamedSharding(mesh, P())
    tx = rmsprop(0.1, **FORMS["centered"], storage=STORAGES[storage])
    params, grads = values(0, MORE), values(1, MORE)
    shapes = jax.eval_shape(tx.init, params)
    for part, name, array in arrays(shapes):
        assert part == "scales" or array.ndim == params[name].ndim, (part, name)
    places = optax.tree.map_params(
        tx, lambda _, place: place, shapes, wanted, transform_non_params=lambda _: replicated
    )
    host = tx.init(params)
    _, want = jax.jit(tx.update)(grads, host)
    params, grads = jax.device_put((params, grads), (wanted, wanted))
    state = jax.device_put(host, places)
    update = jax.jit(tx.update, out_shardings=(wanted, places))
    program = update.lower(grads, state).compile()
    assert not collectives(program)
    for start in (state, wait(jax.jit(tx.init, out_shardings=places))(params)):
        assert_placed_like(start, wanted)
        _, new = wait(program)(grads, start)
        assert_placed_like(new, wanted)
        for got, one in zip(arrays(jax.device_get(new)), arrays(want), strict=True):
            if one[1] != "complex":  # which compilers round in their own ways
                assert_same(got[2], one[2])


@functools.cache
def unsharded(storage, form):
    """The states after each of three steps on one device."""
    tx, params = rmsprop(0.1, **FORMS[form], storage=STORAGES[storage]), values(0)
    update, state, states = jax.jit(tx.update), tx.init(params), []
    for t in (1, 2, 3):
        _, state = update(values(t), state, params)
        states.append(jax.device_get(state))
    return states


# Every form in two modes, and the longest in 8 bits in all.
RUNS = {("q8", "centered", *mode): None for mode in MODES}
RUNS |= {(*run, *mode): None for run in itertools.product(STORAGES, FORMS) for mode in MODES[::7]}


@modes(("storage", "form", "axis_type", "use_set_mesh", "jit"), list(RUNS))
def test_a_sharded_state_has_the_bits_of_one_on_one_device(
    storage, form, axis_type, use_set_mesh, jit
):
    """It stays in its place, and its program neither changes nor speaks to other devices.

    An eager init leaves count on one device, where no update leaves it: then the first step has a
    program of its own.
    """
    mesh = mesh_of(4, 2, axis_type=axis_type)
    tx = rmsprop(0.1, **FORMS[form], storage=STORAGES[storage])
    params = jax.device_put(values(0), shardings(mesh))
    with jax.set_mesh(mesh) if use_set_mesh else contextlib.nullcontext():
        state = wait(jax.jit(tx.init) if jit else tx.init)(params)
        for t, want in enumerate(unsharded(storage, form), 1):
            grads = jax.device_put(values(t), shardings(mesh))
            if t == 1 or (t == 2 and not jit):
                program = jax.jit(tx.update).lower(grads, state, params).compile()
                assert not collectives(program)
            # It refuses arguments that are placed otherwise than those it was compiled for.
            updates, state = wait(program)(grads, state, params)
            assert_placed_like(state, shardings(mesh))
            assert_same(jax.device_get(state), want)
    for name, u in updates.items():
        assert u.sharding.is_equivalent_to(params[name].sharding, u.ndim)


@each_axis_type
def test_an_update_that_is_not_compiled_has_the_same_bits(axis_type):
    mesh = mesh_of(4, 2, axis_type=axis_type)
    tx = rmsprop(0.1, **FORMS["centered"], storage=STORAGES["q8"])
    state = wait(tx.init)(jax.device_put(values(0), shardings(mesh)))
    for t, want in enumerate(unsharded("q8", "centered"), 1):
        _, state = wait(tx.update)(jax.device_put(values(t), shardings(mesh)), state)
        assert_placed_like(state, shardings(mesh))
        assert_same(jax.device_get(state), want)


@each_axis_type
@each_storage
def test_no_step_but_the_second_is_compiled_anew(storage, axis_type):
    sharding = NamedSharding(mesh_of(8, axis_type=axis_type), P(None, "x"))
    params = jax.device_put(jnp.ones((2, 128)), sharding)
    for compile_init in (False, True):
        tx = rmsprop(0.1, momentum=0.9, storage=STORAGES[storage])
        update = jax.jit(lambda *args, tx=tx: tx.update(*args))
        state = wait(jax.jit(tx.init) if compile_init else tx.init)(params)
        for _ in range(4):
            _, state = wait(update)(params, state)
        assert update._cache_size() == (1 if compile_init else 2)


@pytest.mark.parametrize("devices", [2, 3, 6, 8])
@pytest.mark.parametrize("block", [1, 6, 16, 96, 128])
@each_axis_type
def test_blocks_that_do_not_fit_the_shards_are_refused_with_some_that_do(axis_type, block, devices):
    sharding = NamedSharding(mesh_of(devices, axis_type=axis_type), P(None, "x"))
    for piece in (1, 5, 16, 17, 44, 64, 95, 160):
        shape = (2, devices * piece)
        params = {"a": {"w": jax.device_put(jnp.ones(shape), sharding)}}
        init = rmsprop(0.1, storage=low_memory.q8(block, 0)).init
        try:
            state = wait(init)(params)
        except ValueError as error:
            message = str(error)
            assert f"parameter 'a/w', of shape {shape}, is sharded in pieces of {piece}," in message
            if axis_type is AxisType.Explicit:
                with pytest.raises(ValueError, match=re.escape(message)):
                    jax.jit(init)(params)
            advice = re.search(r"q8\(block=(\d+)\) makes blocks of (\d+), which do", message)
            advised, made = map(int, advice.groups())
            state = wait(rmsprop(0.1, storage=low_memory.q8(advised, 0)).init)(params)
            assert state.nu.exponents["a"]["w"].shape[-1] * made == shape[-1]
        exponents = state.nu.exponents["a"]["w"]
        assert exponents.sharding.is_equivalent_to(sharding, 2)
        assert piece % (shape[-1] // exponents.shape[-1]) == 0


def misfit(axis_type=AxisType.Auto, size=192 * 5):
    """A vector on six devices whose blocks do not divide its pieces."""
    sharding = NamedSharding(mesh_of(6, axis_type=axis_type), P("x"))
    return {"odd": jax.device_put(jnp.ones(size), sharding)}


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
    assert_placed_like(state, {"odd": params["odd"].sharding})
    assert state.nu.codes["odd"].dtype == state.trace.codes["odd"].dtype == jnp.float32
    program = jax.jit(tx.update).lower(params, state).compile()
    assert not collectives(program)
    assert_placed_like(wait(program)(params, state)[1], {"odd": params["odd"].sharding})


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
    free = jax.tree.map(lambda p: jnp.ones(p.shape), params)
    want = jax.jit(tx.update)(free, tx.init(free))
    assert_same(*map(jax.device_get, (wait(jax.jit(tx.update))(params, state), want)))


@pytest.mark.parametrize("jit", [False, True])
def test_a_state_is_on_the_device_of_its_parameters_and_as_free_to_move(jit):
    tx = rmsprop(0.1, momentum=0.9, storage=STORAGES["q8"])
    init = jax.jit(tx.init) if jit else tx.init
    params = {"w": jnp.ones((2, 128))}
    for device, where in ((jax.devices()[0], None), (jax.devices()[3], jax.devices()[3])):
        placed = params if where is None else jax.device_put(params, where)
        for *names, array in arrays(init(placed)):
            assert array.devices() == {device}, names
            assert array.committed == (where is not None), names


@each_storage
def test_states_are_born_in_the_memory_of_the_host_if_the_parameters_are(storage):
    sharding = NamedSharding(mesh_of(8), P("x"), memory_kind="pinned_host")
    params = {"vector": jax.device_put(jnp.ones(256), sharding)}
    state = wait(rmsprop(0.1, storage=STORAGES[storage]).init)(params)
    for *names, array in arrays(state):
        assert array.sharding.memory_kind == "pinned_host", names


SPECS = [P("x"), P(None, "x"), P("x", "y"), P(None, ("x", "y")), P(("y", "x")), P()]


@pytest.mark.parametrize(("storage", "size"), [("q8", 2 + 2 / 16), ("bfloat16", 4)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_bytes_on_each_device(storage, size, spec, jit):
    """Of nu and the buffer together; and 4 for each of the scales."""
    params = jax.device_put(jnp.ones((16, 1024)), NamedSharding(mesh_of(4, 2), spec))
    tx = rmsprop(0.1, momentum=0.9, storage=STORAGES[storage])
    state = wait(jax.jit(tx.init) if jit else tx.init)(params)
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(state._replace(count=None)):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    elements = params.addressable_shards[0].data.size
    assert set(held.values()) == {elements * size + 8 * (storage == "q8")}


STACK = (8, 2, 32)  # a part for each device
GRADIENT = np.random.default_rng(0).standard_normal(STACK[1:]).astype(np.float32)


def mapped_run(make_storage, axis_name, check_vma):
    """The state after three steps in shard_map on eight parts with the same gradients."""
    mesh = mesh_of(4, 2) if axis_name == ("x", "y") else mesh_of(8)
    spec = P(mesh.axis_names)
    tx = rmsprop(0.1, **FORMS["centered"], storage=make_storage(axis_name))
    params, grads = jax.device_put(
        (jnp.ones(STACK), np.broadcast_to(GRADIENT, STACK)), NamedSharding(mesh, spec)
    )
    shapes = jax.eval_shape(tx.init, params)
    specs = optax.tree.map_params(tx, lambda _: spec, shapes, transform_non_params=lambda _: P())
    shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    init = shard_map(tx.init, in_specs=spec, out_specs=specs)
    update = shard_map(tx.update, in_specs=(spec, specs), out_specs=(spec, specs))
    state, update = wait(jax.jit(init))(params), wait(jax.jit(update))
    for _ in range(3):
        _, state = update(grads, state)
    return jax.device_get(state)


def noisy(state):
    """What was rounded at random, of the slots of a single leaf."""
    return [array for part, _, array in arrays(state) if part in ("codes", "array")]


MAKE = {
    "q8": lambda axis_name: low_memory.q8(block=16, min_size=0, axis_name=axis_name),
    "bfloat16": lambda axis_name: low_memory.bfloat16(axis_name=axis_name),
}
each_maker = pytest.mark.parametrize("make_storage", MAKE.values(), ids=MAKE)


@each_maker
@pytest.mark.parametrize("check_vma", [False, True])
def test_shards_of_shard_map_round_alike_and_as_each_would_alone(make_storage, check_vma):
    state = mapped_run(make_storage, None, check_vma)
    tx = rmsprop(0.1, **FORMS["centered"], storage=make_storage(None))
    alone, update = tx.init(jnp.ones((1, *STACK[1:]))), jax.jit(tx.update)
    for _ in range(3):
        _, alone = update(jnp.asarray(GRADIENT[None]), alone)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))


@each_maker
@pytest.mark.parametrize("axis_name", ["x", ("x",), ("x", "y")], ids=str)
@pytest.mark.parametrize("check_vma", [False, True])
def test_shards_of_a_named_axis_round_independently(make_storage, axis_name, check_vma):
    """Of two neighbours each takes one: for half of the numbers, or fewer, not the same."""
    state = mapped_run(make_storage, axis_name, check_vma)
    for array in noisy(state):
        for a, b in itertools.combinations(array, 2):
            assert np.mean(a != b) > 0.1


@each_maker
@pytest.mark.parametrize("check_vma", [False, True])
def test_what_shard_map_replicates_stays_equal(make_storage, check_vma):
    mesh = mesh_of(8)
    tx = rmsprop(0.1, **FORMS["centered"], storage=make_storage(None))

    def step(weight, params, state):
        grads = jax.lax.pmean(weight * jnp.asarray(GRADIENT), "x")
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
        copies = jax.tree.map(lambda leaf: leaf[None], (params, state))
        return params, state, copies

    update = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P("x"), P(), P()),
            out_specs=(P(), P(), P("x")),
            check_vma=check_vma,
        )
    )
    params = jax.device_put(jnp.ones(STACK[1:]), NamedSharding(mesh, P()))
    state, weights = wait(jax.jit(tx.init))(params), jnp.arange(1.0, 9.0)
    for _ in range(3):
        params, state, copies = wait(update)(weights, params, state)
    for array in map(np.asarray, jax.tree.leaves(copies)):
        np.testing.assert_array_equal(array, np.broadcast_to(array[0], array.shape))


@each_maker
@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_replicas_of_pmap_stay_equal_unless_their_axis_is_named(make_storage, axis_name):
    tx = rmsprop(0.1, **FORMS["centered"], storage=make_storage(axis_name))

    def step(params, state, weight):
        grads = jax.lax.pmean(weight * jnp.asarray(GRADIENT), "batch")
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    update = wait(jax.pmap(step, axis_name="batch"))
    params = jnp.ones(STACK)
    state = wait(jax.pmap(tx.init))(params)
    for _ in range(3):
        params, state = update(params, state, jnp.arange(1.0, 9.0))
    for array in noisy(jax.device_get(state)):
        for a, b in itertools.combinations(array, 2):
            assert np.any(a != b) == (axis_name is not None)
    if axis_name is None:
        for array in map(np.asarray, jax.tree.leaves((params, state))):
            np.testing.assert_array_equal(array, np.broadcast_to(array[0], array.shape))


@each_maker
@pytest.mark.parametrize("jit", [False, True])
def test_an_axis_that_is_not_mapped_is_named_by_jax(make_storage, jit):
    tx = rmsprop(0.1, storage=make_storage("rows"))
    params = jnp.ones((2, 32))
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(NameError, match="unbound axis name: rows"):
        update(params, tx.init(params))

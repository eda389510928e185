"""Small states on many devices: placed like the parameters, bit-identical to one device."""

import collections
import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from helpers import assert_moved, assert_same, bytes_held, collectives, mesh_of, side_by_side, wait
from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._storage import Joined

STORAGES = {
    "q8": low_memory.q8(min_size=100, exempt=lambda path: path == "exempt"),
    "bfloat16": low_memory.bfloat16(exempt=lambda path: path == "small"),
}
# The shape, dtype and shards of each leaf, on a mesh of 4 x 2; "small" is held in float32.
LEAVES = {
    "vector": ((256,), "float32", P("x")),
    "rows": ((8, 53), "float32", P("x")),  # a prime axis, which no block divides
    "one column": ((256, 1), "float32", P("x")),
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
    if isinstance(value, tuple):
        return f"{len(value)} forms"
    return getattr(value, "name", str(value))


modes = functools.partial(pytest.mark.parametrize, ids=name_of)
each_axis_type = pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=name_of)
each_storage = pytest.mark.parametrize("storage", STORAGES)


def values(t, leaves=LEAVES):
    """The parameters if t is 0, or the gradients of step t."""
    rng = np.random.default_rng(t)
    return {
        name: np.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape)).astype(
            jnp.dtype(dtype)
        )
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


@functools.cache
def nans():
    return jax.tree.map(lambda p: np.full_like(p, np.nan), values(0))


INITIAL = {
    name: rmsprop(0.1, initial_scale=0.5, centered=True, momentum=0.9, storage=storage)
    for name, storage in STORAGES.items()
}


def of_each(txs):
    """One transformation with a state for each, all of the same parameters and gradients."""
    tx = side_by_side(txs)

    def init(params):
        return tx.init(dict.fromkeys(txs, params))

    def update(grads, state, params=None):
        return tx.update(dict.fromkeys(txs, grads), state, params and dict.fromkeys(txs, params))

    return optax.GradientTransformation(init, update)


@functools.cache
def unsharded_init():
    return jax.device_get(jax.jit(of_each(INITIAL).init)(nans()))


@modes(("axis_type", "use_set_mesh", "jit"), MODES)
def test_init_places_the_state_like_the_parameters(axis_type, use_set_mesh, jit, subtests):
    """NaN parameters: the place must not come from arithmetic with their values."""
    mesh, tx = mesh_of(4, 2, axis_type=axis_type), of_each(INITIAL)
    params = jax.device_put(nans(), shardings(mesh))
    with jax.set_mesh(mesh) if use_set_mesh else contextlib.nullcontext():
        states = wait(jax.jit(tx.init) if jit else tx.init)(params)
    for storage, state in states.items():
        with subtests.test(storage=storage):
            assert_placed_like(state, shardings(mesh))
            assert_same(jax.device_get(state), unsharded_init()[storage])


# Leaves of which nothing is in 8 bits.
MORE = LEAVES | {
    "exempt": ((2, 4096), "float32", P("y", "x")),
    "complex": ((8, 6), "complex64", P("x", "y")),
}


@functools.cache
def one_step(tx):
    """State and the state after one step, on one device."""
    params, grads = values(0, MORE), values(1, MORE)
    state = jax.jit(tx.init)(params)
    return jax.device_get((state, jax.jit(tx.update)(grads, state)[1]))


EACH_CENTERED = of_each(
    {name: rmsprop(0.1, **FORMS["centered"], storage=held) for name, held in STORAGES.items()}
)


@each_axis_type
def test_every_array_but_the_scales_can_be_given_the_sharding_of_its_parameter(axis_type, subtests):
    """As jit, device_put and restored checkpoints are told where a state is to be."""
    mesh = mesh_of(4, 2, axis_type=axis_type)
    wanted, everywhere = shardings(mesh, MORE), NamedSharding(mesh, P())
    params, grads = jax.device_put((values(0, MORE), values(1, MORE)), (wanted, wanted))
    host, want = one_step(EACH_CENTERED)
    places = {}
    for storage, state in host.items():
        for part, name, array in arrays(state):
            assert part == "scales" or array.ndim == params[name].ndim, (part, name)
        places[storage] = optax.tree.map_params(
            rmsprop(0.1, **FORMS["centered"], storage=STORAGES[storage]),
            lambda _, place: place,
            state,
            wanted,
            transform_non_params=lambda _: everywhere,
        )
    state = jax.device_put(host, places)
    update = jax.jit(EACH_CENTERED.update, out_shardings=(dict.fromkeys(STORAGES, wanted), places))
    program = update.lower(grads, state).compile()
    assert set(reductions(program)) == {"u8", "s8"}  # of the largest codes
    born = wait(jax.jit(EACH_CENTERED.init, out_shardings=places))(params)
    for way, start in (("device_put", state), ("jit", born)):
        _, new = wait(program)(grads, start)
        for storage in STORAGES:
            with subtests.test(way, storage=storage):
                assert_placed_like(start[storage], wanted)
                assert_placed_like(new[storage], wanted)
                got = arrays(jax.device_get(new[storage]))
                for (*_, a), (_, name, b) in zip(got, arrays(want[storage]), strict=True):
                    if name != "complex":  # which compilers round in their own ways
                        assert_same(a, b)


RUNS = {
    f"{storage}, {form}": rmsprop(0.1, **FORMS[form], storage=STORAGES[storage])
    for storage, form in itertools.product(STORAGES, FORMS)
}
LONGEST = ("q8, centered", "bfloat16, centered")
OTHERS = tuple(name for name in RUNS if name not in LONGEST)


@functools.cache
def unsharded(names):
    """The states after each of three steps on one device."""
    tx, params = of_each({name: RUNS[name] for name in names}), values(0)
    update, state, states = jax.jit(tx.update), jax.jit(tx.init)(params), []
    for t in (1, 2, 3):
        _, state = update(values(t), state, params)
        states.append(jax.device_get(state))
    assert_moved(states)
    return states


def reductions(program):
    """How many scalars of each dtype are all-reduced; it has no other communication."""
    assert set(collectives(program)) <= {"all-reduce"}
    results = re.findall(r"= (.*?) all-reduce(?:-start)?\(", program.as_text())
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", " ".join(results))
    assert all(dimensions == "" for _, dimensions in arrays)
    return collections.Counter(dtype for dtype, _ in arrays)


@modes(
    ("axis_type", "use_set_mesh", "names"),
    [
        *((*mode, LONGEST) for mode in itertools.product(AXIS_TYPES, [False, True])),
        pytest.param(AxisType.Auto, False, OTHERS, marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, True, OTHERS, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_state_has_the_bits_of_one_on_one_device(
    axis_type, use_set_mesh, names, subtests
):
    """It stays in its place, and its program does not change.

    In 8 bits the devices agree on the largest code of each leaf that is split: a number for a
    second moment, and for momentum, which has signs, two; along each axis of the mesh.

    A compiled init and an eager one start the same program: count alone can be elsewhere at first.
    """
    mesh = mesh_of(4, 2, axis_type=axis_type)
    tx = of_each({name: RUNS[name] for name in names})
    params = jax.device_put(values(0), shardings(mesh))
    with jax.set_mesh(mesh) if use_set_mesh else contextlib.nullcontext():
        program = None
        for init in (jax.jit(tx.init), tx.init):
            state = wait(init)(params)
            for t, want in enumerate(unsharded(names), 1):
                grads = jax.device_put(values(t), shardings(mesh))
                if program is None:
                    program = jax.jit(tx.update).lower(grads, state, params).compile()
                    specs = [spec for name, (*_, spec) in LEAVES.items() if name != "small"]
                    split = sum(axis is not None for spec in specs for axis in spec)
                    forms = [FORMS[n.removeprefix("q8, ")] for n in names if n.startswith("q8")]
                    traces = sum("momentum" in form for form in forms)
                    assert reductions(program) == {
                        "u8": split * len(forms),
                        "s8": 2 * split * traces,
                    }
                    for shape, _, spec in LEAVES.values():  # nor are bits drawn for whole leaves
                        whole = f"u32[{','.join(map(str, shape))}]"
                        assert whole not in program.as_text() or not any(spec)
                # It refuses arguments that are placed otherwise than those it was compiled for.
                updates, state = wait(program)(grads, state, params)
                for name in names:
                    with subtests.test(name, jit=init is not tx.init, step=t):
                        assert_placed_like(state[name], shardings(mesh))
                        assert_same(jax.device_get(state[name]), want[name])
                        for leaf, u in updates[name].items():
                            assert u.sharding.is_equivalent_to(params[leaf].sharding, u.ndim)


@each_axis_type
def test_an_update_that_is_not_compiled_has_the_same_bits(axis_type):
    mesh = mesh_of(4, 2, axis_type=axis_type)
    tx = RUNS["q8, centered"]
    state = wait(tx.init)(jax.device_put(values(0), shardings(mesh)))
    for t, want in enumerate(unsharded(LONGEST), 1):
        _, state = wait(tx.update)(jax.device_put(values(t), shardings(mesh)), state)
        assert_placed_like(state, shardings(mesh))
        assert_same(jax.device_get(state), want["q8, centered"])


@each_axis_type
def test_a_step_is_compiled_once(axis_type):
    place = NamedSharding(mesh_of(8, axis_type=axis_type), P(None, "x"))
    params = jax.device_put(np.ones((2, 128), np.float32), place)
    for compile_init in (False, True):
        tx = of_each({n: rmsprop(0.1, momentum=0.9, storage=s) for n, s in STORAGES.items()})
        update = jax.jit(tx.update)
        state = wait(jax.jit(tx.init) if compile_init else tx.init)(params)
        for _ in range(4):
            _, state = wait(update)(params, state)
        assert update._cache_size() == 1


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
    params = {"vector": jax.device_put(np.ones(256, np.float32), sharding)}
    state = wait(rmsprop(0.1, storage=STORAGES[storage]).init)(params)
    for *names, array in arrays(state):
        assert array.sharding.memory_kind == "pinned_host", names


SPECS = [P("x"), P(None, "x"), P("x", "y"), P(None, ("x", "y")), P(("y", "x")), P()]


@pytest.mark.parametrize("jit", [False, True])
def test_bytes_on_each_device(jit, subtests):
    """Of nu and the buffer together; and 4 for each of the scales."""
    mesh = mesh_of(4, 2)
    ones = dict.fromkeys(map(str, SPECS), np.ones((16, 1024), np.float32))
    params = jax.device_put(ones, {str(spec): NamedSharding(mesh, spec) for spec in SPECS})
    for storage, size in (("q8", 2), ("bfloat16", 4)):
        tx = rmsprop(0.1, momentum=0.9, storage=STORAGES[storage])
        of_all = side_by_side(dict.fromkeys(params, tx))
        states = wait(jax.jit(of_all.init) if jit else of_all.init)(params)
        for spec, state in states.items():
            with subtests.test(storage=storage, spec=spec):
                elements = params[spec].addressable_shards[0].data.size
                want = elements * size + 8 * (storage == "q8")
                held = bytes_held(state._replace(count=None))
                assert held == dict.fromkeys(jax.devices(), want)

"""Steps on rows in all kinds of program: bit-identical, in place, on any number of devices."""

import functools

import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from helpers import collectives, mesh_of
from rmsprop_jax import rmsprop, rows
from storages import types

N, WIDTH, BATCH = 32, 4, 6
TX = rmsprop(0.01, momentum=0.9, centered=True)
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((N, WIDTH)).astype(np.float32)
BATCHES = [
    (RNG.integers(0, N, BATCH), RNG.standard_normal((BATCH, WIDTH)).astype(np.float32))
    for _ in range(8)
]


def step(tx, table, state, indices, grads):
    if state.steps is not None:
        table, state = rows.advance(tx, indices, table, state)
    return rows.update(tx, indices, grads, table, state)


def run(advance, table, state):
    carry = table, state
    for batch in BATCHES:
        carry = advance(*carry, *batch)
    return carry


def assert_same(a, b):
    assert types(a) == types(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


FORMS = {
    "dense": (TX, False),
    "dense, weight decay": (
        rmsprop(0.01, momentum=0.9, weight_decay=0.1, decoupled_weight_decay=True),
        False,
    ),
    "dense, bias": (rmsprop(0.01, bias_correction=True), False),
    "lazy": (TX, True),
}


@pytest.mark.parametrize("form", FORMS)
def test_bits_are_the_same_eagerly_compiled_and_in_scan(form):
    tx, lazy = FORMS[form]
    one = functools.partial(step, tx)
    start = jnp.asarray(TABLE), rows.init(tx, TABLE, lazy=lazy)
    eagerly = run(one, *start)
    assert_same(run(jax.jit(one), *start), eagerly)
    stacked = jax.tree.map(lambda *a: np.stack(a), *BATCHES)
    in_scan, _ = jax.lax.scan(lambda carry, batch: (one(*carry, *batch), None), start, stacked)
    assert_same(in_scan, eagerly)
    if not lazy:
        settle = functools.partial(rows.settle, tx)
        assert_same(jax.jit(settle)(*eagerly), settle(*eagerly))


@pytest.mark.parametrize("form", FORMS)
def test_a_donated_step_is_in_place_and_needs_memory_for_its_batch_alone(form):
    """Whatever the size of the table: nothing as large as it is there for a moment."""
    tx, lazy = FORMS[form]
    temporary = []
    for n in (4096, 65536):
        table = jax.ShapeDtypeStruct((n, 32), jnp.float32)
        state = jax.eval_shape(lambda table: rows.init(tx, table, lazy=lazy), table)
        batch = jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((64, 32), jnp.float32)
        one = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
        memory = one.lower(table, state, *batch).compile().memory_analysis()
        held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((table, state)))
        assert memory.alias_size_in_bytes == held
        temporary.append(memory.temp_size_in_bytes)
    assert temporary[0] == temporary[1]
    assert temporary[0] < 16 * 64 * 32 * 4  # 16 arrays of the batch


def test_settling_needs_two_arrays_like_the_table():
    table = jax.ShapeDtypeStruct((4096, 32), jnp.float32)
    state = jax.eval_shape(lambda table: rows.init(TX, table), table)
    settle = jax.jit(functools.partial(rows.settle, TX), donate_argnums=(0, 1))
    memory = settle.lower(table, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.2 * 4 * 4096 * 32


def test_a_state_depends_on_its_table_and_can_be_exported():
    exported = export.export(jax.jit(functools.partial(step, TX)))(
        TABLE, rows.init(TX, TABLE), *BATCHES[0]
    )
    again = export.deserialize(exported.serialize())
    got = again.call(jnp.asarray(TABLE), rows.init(TX, TABLE), *BATCHES[0])
    assert_same(got, step(TX, jnp.asarray(TABLE), rows.init(TX, TABLE), *BATCHES[0]))


def test_vmap_steps_many_tables():
    tables = jnp.stack([TABLE, 2 * TABLE])
    states = jax.vmap(lambda table: rows.init(TX, table))(tables)
    indices, grads = BATCHES[0]
    each = np.stack([indices, indices[::-1]])
    found = jax.vmap(functools.partial(step, TX), in_axes=(0, 0, 0, None))(
        tables, states, each, grads
    )
    for i in range(2):
        state = rows.init(TX, tables[i])
        want = jax.jit(functools.partial(step, TX))(tables[i], state, each[i], grads)
        for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


@pytest.fixture(scope="module")
def alone():
    return run(jax.jit(functools.partial(step, TX)), jnp.asarray(TABLE), rows.init(TX, TABLE))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_parts_of_a_table_are_stepped_without_communication(axis_type, alone):
    mesh = mesh_of(4, axis_type=axis_type)
    with jax.set_mesh(mesh):
        table = jax.device_put(TABLE, NamedSharding(mesh, P("x")))
        state = rows.init(TX, table)
        for array in jax.tree.leaves(state):
            assert array.ndim == 0 or array.sharding.spec[0] == "x"
        spec = jax.tree.map(lambda array: P("x") if array.ndim else P(), state)

        def of_part(part, state, indices, grads):
            own = indices - jax.lax.axis_index("x") * len(part)
            return step(TX, part, state, own, grads)

        in_specs = (P("x"), spec, P(), P())
        one = jax.jit(
            jax.shard_map(of_part, mesh=mesh, in_specs=in_specs, out_specs=(P("x"), spec))
        )
        found = run(one, table, state)
        assert collectives(one.lower(table, state, *BATCHES[0]).compile()) == {}
    for a, b in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()], ids=str)
def test_under_jit_a_split_table_has_the_same_bits(spec, alone):
    mesh = mesh_of(4)
    table = jax.device_put(TABLE, NamedSharding(mesh, spec))
    found = run(jax.jit(functools.partial(step, TX)), table, rows.init(TX, table))
    for a, b in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert found[0].sharding.is_equivalent_to(table.sharding, 2)
    assert found[1].inner.trace.sharding.is_equivalent_to(table.sharding, 2)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=str)
def test_a_split_table_on_an_explicit_mesh_is_refused(spec):
    mesh = mesh_of(4, axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        table = jax.device_put(TABLE, NamedSharding(mesh, spec))
        state = rows.init(TX, table)
        message = (
            r"^table must be replicated on an Explicit mesh, got float32\[32.*inside jax.shard_map$"
        )
        with pytest.raises(ValueError, match=message):
            rows.update(TX, *BATCHES[0], table, state)
        with pytest.raises(ValueError, match=message):
            rows.advance(TX, BATCHES[0][0], table, state)
        whole = jax.device_put(TABLE, NamedSharding(mesh, P()))
        rows.update(TX, *BATCHES[0], whole, rows.init(TX, whole))


def test_a_population_learns_at_different_rates(caplog):
    """By vmap over hyperparameters; no tracer stays behind, and new values compile nothing anew."""
    indices, grads = BATCHES[0]

    def moved(rate, momentum):
        tx = rmsprop(rate, momentum=momentum)
        table, state = jnp.asarray(TABLE), rows.init(tx, TABLE)
        for _ in range(3):
            table, state = step(tx, table, state, indices, grads)
        return rows.settle(tx, table, state)[0]

    rates, momenta = jnp.array([0.1, 0.2]), jnp.array([0.9, 0.5])
    with jax.checking_leaks():
        found = jax.jit(jax.vmap(moved))(rates, momenta)
    for got, rate, momentum in zip(found, rates, momenta, strict=True):
        np.testing.assert_allclose(got, moved(rate, momentum), rtol=1e-6)
    with jax.log_compiles(True):
        moved(jnp.float32(0.3), jnp.float32(0.6))
    assert "Compiling jit(stepped)" not in caplog.text
    with jax.log_compiles(True):
        moved(0.3, 0.6)  # which are constants
    assert "Compiling jit(stepped)" in caplog.text

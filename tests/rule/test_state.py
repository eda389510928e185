"""The structure, dtypes and placement of the state, which never change after init."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from rmsprop_jax import RMSPropState, rmsprop, scale_by_rms

EVERYTHING = {"centered": True, "momentum": 0.9, "bias_correction": True}
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def test_dtypes_never_change(subtests):
    """For parameters and gradients of every two dtypes that go together, in one tree."""
    pairs = [p for p in itertools.product(DTYPES, repeat=2) if ("c" in p[0]) == ("c" in p[1])]
    assert len(pairs) == 20  # those of a real and a complex one are refused: test_bad_input
    shape = (2, 3)
    with jax.enable_x64(True):
        tx = rmsprop(0.1, **EVERYTHING, cautious=True, weight_decay=0.1)
        params = {" ".join(pair): np.ones(shape, jnp.dtype(pair[0])) for pair in pairs}
        grads = {" ".join(pair): np.ones(shape, jnp.dtype(pair[1])) for pair in pairs}
        state = tx.init(params)
        runs = [update(grads, state, params) for update in (tx.update, jax.jit(tx.update))]
        for param, grad in pairs:
            wide = param in ("float64", "complex128")
            real = jnp.float64 if wide else jnp.float32
            signed = real if "c" not in param else jnp.complex128 if wide else jnp.complex64
            leaf = f"{param} {grad}"
            with subtests.test(param=param, grad=grad):
                for updates, held in ((None, state), *runs):
                    assert types(held.nu[leaf]) == (shape, real, False)
                    assert types(held.mu[leaf]) == types(held.trace[leaf]) == (shape, signed, False)
                    assert updates is None or types(updates[leaf]) == (shape, grad, False)
                one = jax.eval_shape(tx.init, params[leaf])
                assert types(one.weight_sum) == ((), real, False)
        for _, new in runs:
            assert jax.tree.structure(new) == jax.tree.structure(state)
            assert types(new) == types(state)
            assert types(new.count) == ((), jnp.int32, False)


@pytest.mark.parametrize("leaf", [1.0, np.float32(1), np.ones(3, np.float16), jnp.asarray(1.0)])
def test_weak_and_foreign_leaves(leaf):
    """Python floats, NumPy arrays and weakly typed parameters get strong float32 slots."""
    tx = rmsprop(0.1, momentum=0.9)
    state = tx.init({"a": leaf})
    assert types(state.nu)["a"] == (np.shape(leaf), jnp.float32, False)
    updates, new = tx.update({"a": leaf}, state)
    assert not updates["a"].weak_type
    assert types(new) == types(state)


def test_slots_not_in_use_are_none_as_a_whole():
    params = {"w": jnp.ones(3)}
    assert rmsprop(0.1).init(params)._replace(count=None, nu=None) == (None,) * 5
    state = rmsprop(0.1, **EVERYTHING).init(params)
    assert all(field is not None for field in state)


def test_initial_scale_fills_nu_and_nothing_else():
    state = rmsprop(0.1, initial_scale=0.5, centered=True, momentum=0.9).init(jnp.ones(3))
    np.testing.assert_array_equal(state.nu, 0.5)
    np.testing.assert_array_equal(state.mu, 0)
    np.testing.assert_array_equal(state.trace, 0)


def test_no_two_buffers_are_shared():
    params = jnp.zeros(3)
    for init in (rmsprop(0.1, **EVERYTHING).init, jax.jit(rmsprop(0.1, **EVERYTHING).init)):
        leaves = jax.tree.leaves((params, init(params)))
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_abstract_empty_and_scalar_trees():
    tx = rmsprop(0.1, **EVERYTHING)
    abstract = tx.init({"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)})
    assert abstract.nu["w"].shape == (2, 3)
    shapes = jax.eval_shape(tx.init, {"w": jnp.ones((2, 3), jnp.bfloat16)})
    assert shapes.nu["w"].dtype == jnp.float32
    for empty in ({}, (), None, {"a": None}):
        updates, state = tx.update(empty, tx.init(empty))
        assert updates == empty
        assert int(state.count) == 1
    zero_size = jnp.ones((0, 3))
    updates, _ = rmsprop(0.1, momentum=0.9, cautious=True).update(
        zero_size, rmsprop(0.1, momentum=0.9).init(zero_size)
    )
    assert updates.shape == (0, 3)


def test_none_gradients_skip_their_leaf():
    tx = rmsprop(0.1, weight_decay=0.1, **EVERYTHING)
    params = {"a": jnp.ones(2), "b": jnp.ones(3), "c": None}
    _, state = tx.update(params, tx.init(params), params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, new = update({"a": None, "b": 2 * jnp.ones(3), "c": None}, state, params)
        assert updates["a"] is None
        assert updates["c"] is None
        assert jax.tree.structure(new) == jax.tree.structure(state)
        for slot in ("nu", "mu", "trace"):
            np.testing.assert_array_equal(getattr(new, slot)["a"], getattr(state, slot)["a"])
            assert bool(jnp.any(getattr(new, slot)["b"] != getattr(state, slot)["b"]))


def test_the_state_is_one_public_class():
    for tx in (rmsprop(0.1), rmsprop(0.1, **EVERYTHING), rmsprop(0.1, nesterov=True, momentum=0.9)):
        assert type(tx.init(jnp.ones(2))) is RMSPropState
    assert type(scale_by_rms().init(jnp.ones(2))) is RMSPropState


@pytest.mark.parametrize("axis_type", list(AxisType)[:2], ids=lambda t: t.name)
@pytest.mark.parametrize("use_set_mesh", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_init_keeps_the_sharding_of_the_parameters(axis_type, use_set_mesh, jit):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    shardings = {
        "rows": NamedSharding(mesh, PartitionSpec("x")),
        "both": NamedSharding(mesh, PartitionSpec("y", "x")),
        "replicated": NamedSharding(mesh, PartitionSpec()),
    }
    # NaN parameters: the sharding must not come from arithmetic with their values.
    params = {
        f"{name} {dtype}": jax.device_put(np.full((8, 8), np.nan, jnp.dtype(dtype)), sharding)
        for name, sharding in shardings.items()
        for dtype in ("float32", "bfloat16", "complex64")
    }
    tx = rmsprop(0.1, initial_scale=0.5, centered=True, momentum=0.9)
    with jax.set_mesh(mesh) if use_set_mesh else contextlib.nullcontext():
        state = (jax.jit(tx.init) if jit else tx.init)(params)
        updates, new = jax.jit(tx.update)(params, state)
    for tree in (state.nu, state.mu, state.trace, new.nu, new.mu, new.trace, updates):
        for name, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(params[name].sharding, 2), (name, leaf.sharding)
    for leaf in state.nu.values():
        np.testing.assert_array_equal(leaf, 0.5)


def test_a_weakly_typed_parameter_keeps_its_sharding():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    weak = jax.jit(lambda: jax.lax.full((8,), 1.0, None), out_shardings=sharding)()
    for init in (rmsprop(0.1).init, jax.jit(rmsprop(0.1).init)):
        assert init(weak).nu.sharding.is_equivalent_to(sharding, 1)


def test_states_are_sharded_under_optax_wrappers():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = jax.device_put(jnp.ones(16), sharding)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.MultiSteps(rmsprop(0.1), 2))
    state = jax.jit(tx.init)(params)
    assert optax.tree.get(state, "nu").sharding.is_equivalent_to(sharding, 1)

"""Conversions of small states, from and to frameworks and between storages."""

import copy
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from conversions import FRAMEWORKS, tree
from helpers import assert_same, mesh_of
from rmsprop_jax import convert, dialects, low_memory, rmsprop
from rmsprop_jax._rule import is_ours
from small_states import decoded, last, trained
from storages import FULL, GRADS, PARAMS, SMALL, STACKED, types

each_storage = pytest.mark.parametrize("storage", SMALL.values(), ids=SMALL)
STORAGES = {"q8": low_memory.q8(min_size=0), "bfloat16": low_memory.bfloat16()}
BUILD = {
    "pytorch": dialects.pytorch,
    "timm": dialects.timm,
    "keras": functools.partial(dialects.keras, 0.01),
    "tensorflow": functools.partial(dialects.tensorflow_v1, 0.01),
    "optax": functools.partial(rmsprop, 0.01),
}


def arrays(state):
    """The values of each slot of each leaf, by their paths, as NumPy arrays in double precision."""
    slots = {field: decoded(getattr(state, field)) for field in ("nu", "mu", "trace")}
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(values, np.float64)
        for path, values in jax.tree_util.tree_leaves_with_path(slots)
    }


@functools.cache
def steps_of_both(storage):
    """A state with all that a framework can have, for the tree of the conversions."""
    grads = jax.tree.map(lambda *leaves: np.stack(leaves), *map(tree, range(1, 5)))
    tx = rmsprop(0.01, centered=True, momentum=0.9, storage=storage)
    return last(lambda: [tx], grads, tree())[0]


@pytest.mark.parametrize("framework", FRAMEWORKS[::3])
@pytest.mark.parametrize("name", STORAGES)
def test_frameworks_get_values_in_float32_and_give_them_back(name, framework):
    """What they get is what a state in float32 of the same values gives.

    And back: in bfloat16 as it was, in 8 bits with a relative error of 1/8; but a variance, of
    what rounding leaves of the difference of float32 numbers.
    """
    small = copy.copy(framework)
    small.tx = BUILD[framework.name](**framework.options, storage=STORAGES[name])
    params, state = tree(), steps_of_both(STORAGES[name])
    without = {"centered": "mu", "momentum": "trace"}
    state = state._replace(
        **{field: None for option, field in without.items() if option not in framework.options}
    )
    given = small.to(state, params)
    wide = convert.change_storage(state, params, framework.tx)
    for got, want in zip(*map(jax.tree.leaves, (given, framework.to(wide, params))), strict=True):
        np.testing.assert_array_equal(got, want)
        assert np.asarray(got).dtype == np.asarray(want).dtype
    again = small.back(given, params)
    assert types(again) == types(state)
    old, new = arrays(state), arrays(again)
    for path, value in old.items():
        loss = abs(value) * (2**-3 if name == "q8" and not path.startswith("mu") else 2**-9)
        if path.startswith("nu") and framework.options.get("centered"):
            loss = loss + 2**-22 * old[path.replace("nu", "mu", 1)] ** 2
        assert np.any(value != 0)
        assert np.all(abs(new[path] - value) <= loss), path


def wide_state(shape=(64, 128)):
    """A state in float32, of values across 60 octaves and zeros."""
    rng = np.random.default_rng(0)

    def numbers(sign):
        values = 2.0 ** rng.uniform(-60, 0, shape) * sign
        return {"w": jnp.asarray(np.where(rng.random(shape) < 0.1, 0, values), jnp.float32)}

    params = {"w": jnp.ones(shape)}
    signs = rng.choice([-1, 1], shape)
    tx = rmsprop(0.1, **FULL)
    state = tx.init(params)._replace(
        count=jnp.int32(7), nu=numbers(1), mu=numbers(signs), trace=numbers(signs)
    )
    return params, tx, state._replace(weight_sum=jnp.float32(0.5))


def test_float32_to_8_bits_and_back_loses_what_is_said():
    params, wide, state = wide_state()
    small = rmsprop(0.1, **FULL, storage=low_memory.q8())
    held = convert.change_storage(state, params, small)
    assert types(held) == types(jax.eval_shape(small.init, params))
    back = convert.change_storage(held, params, wide)
    assert types(back) == types(state)
    assert int(back.count) == 7
    assert float(back.weight_sum) == 0.5
    old, new = arrays(state), arrays(back)
    nu, got = old["nu/w"], new["nu/w"]
    np.testing.assert_array_equal(got == 0, nu == 0)
    floor = 1.25 * 2.0**-45 * 2.0 ** np.floor(np.log2(nu.max()))
    above = nu > 1.2 * floor
    assert np.all(abs(got - nu)[above] <= nu[above] / 8)
    low = (nu > 0) & ~above
    assert np.any(low)
    assert np.all(got[low] >= nu[low] * 7 / 8)
    np.testing.assert_allclose(got[low], floor, rtol=0.2)
    trace, got = old["trace/w"], new["trace/w"]
    smallest = 2.0**-12 * abs(trace).max()
    assert np.all(abs(got - trace) <= np.maximum(abs(trace) / 16, 0.6 * smallest))
    assert np.all(abs(new["mu/w"] - old["mu/w"]) <= abs(old["mu/w"]) * 2**-8)


def test_float32_to_bfloat16_and_back_is_rounded_to_the_nearest():
    params, wide, state = wide_state()
    small = rmsprop(0.1, **FULL, storage=low_memory.bfloat16())
    back = convert.change_storage(convert.change_storage(state, params, small), params, wide)
    for field in ("nu", "mu", "trace"):
        want = np.asarray(getattr(state, field)["w"]).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(getattr(back, field)["w"], want)


@each_storage
def test_to_the_same_storage_changes_no_bit(storage):
    state = trained(storage)
    tx = rmsprop(0.2, **FULL, storage=storage)
    assert_same(convert.change_storage(state, PARAMS, tx), state)


def test_leaves_that_another_storage_holds_otherwise():
    """From 8 bits to float32 as they are, and back rounded once more."""
    state = trained(SMALL["q8"])
    tx = rmsprop(0.1, **FULL, storage=low_memory.q8(min_size=64))
    new = convert.change_storage(state, PARAMS, tx)
    assert new.nu.codes["b"].dtype == jnp.float32
    assert new.nu.codes["w"].dtype == jnp.uint8
    back = convert.change_storage(new, PARAMS, rmsprop(0.1, **FULL, storage=SMALL["q8"]))
    assert types(back) == types(state)
    old, new, back = arrays(state), arrays(new), arrays(back)
    for path, value in old.items():
        assert np.any(value != 0)
        bound = abs(value) / (8 if path.startswith("nu") else 16)
        if path.startswith("trace"):
            bound = np.maximum(bound, 2.0**-12 * abs(value).max())
        assert np.all(abs(new[path] - value) <= (0 if path.endswith("b") else bound)), path
        assert np.all(abs(back[path] - value) <= 2 * bound), path


def like_params(value):
    return dict.fromkeys(PARAMS, value)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "masked": lambda tx: optax.masked(tx, like_params(True)),
    "partition": lambda tx: optax.partition({"a": tx}, like_params("a")),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "two of them": lambda tx: optax.chain(optax.apply_if_finite(optax.chain(tx), 3)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_state_changes_its_storage(wrap):
    """There and back."""
    storage = SMALL["q8"]
    wide, small = (wrap(rmsprop(0.1, **FULL, storage=one)) for one in (None, storage))
    inner = trained(storage)
    state = jax.tree.map(
        lambda leaf: inner if is_ours(leaf) else leaf, small.init(PARAMS), is_leaf=is_ours
    )
    given = convert.change_storage(state, PARAMS, wide)
    assert types(given) == types(jax.eval_shape(wide.init, PARAMS))
    back = convert.change_storage(given, PARAMS, small)
    assert types(back) == types(state)
    (there,), (again,) = (
        [leaf for leaf in jax.tree.leaves(one, is_leaf=is_ours) if is_ours(leaf)]
        for one in (given, back)
    )
    old, new = arrays(inner), arrays(there)
    for path, value in old.items():
        np.testing.assert_array_equal(new[path], value)
    assert int(again.count) == 4
    nu, got = old["nu/w"], arrays(again)["nu/w"]
    np.testing.assert_allclose(got, nu, rtol=2**-3)


@pytest.mark.usefixtures("default_promotion")  # for Optax
def test_a_partition_changes_one_storage_and_multi_steps_keeps_what_it_gathered():
    def wrapped(a, b):
        txs = {"a": rmsprop(0.1, **FULL, storage=a), "b": rmsprop(0.1, **FULL, storage=b)}
        return optax.MultiSteps(optax.partition(txs, {"w": "a", "b": "b", "s": "b"}), 3)

    q8, bfloat16 = SMALL.values()
    (state,) = last(lambda: [wrapped(None, bfloat16)], STACKED, PARAMS)
    assert int(state.mini_step) == 1
    small = wrapped(q8, bfloat16)
    new = convert.change_storage(state, PARAMS, small)
    assert types(new) == types(jax.eval_shape(small.init, PARAMS))
    assert_same(new._replace(inner_opt_state=None), state._replace(inner_opt_state=None))
    inner = [one.inner_opt_state.inner_states for one in (new, state)]
    assert_same(inner[0]["b"], inner[1]["b"])
    _, after = jax.eval_shape(small.update, GRADS[0], new, PARAMS)
    assert types(after) == types(new)


@each_storage
def test_other_trees_are_refused(storage, subtests):
    state = trained(storage)
    tx = rmsprop(0.1, **FULL)
    form = {name: value for name, value in FULL.items() if name != "momentum"}
    for what, given, leaves, to in (
        ("leaf less", state, {name: PARAMS[name] for name in "wb"}, tx),
        ("narrower", state, PARAMS | {"w": jnp.ones((4, 16))}, tx),
        ("turned", state, PARAMS | {"w": jnp.ones((32, 4))}, tx),
        ("no momentum", state, PARAMS, rmsprop(0.1, **form)),
        ("chain", state, PARAMS, optax.chain(tx)),
        ("tuple", (state, optax.EmptyState()), PARAMS, tx),
        ("field", state.nu, PARAMS, tx),
        ("None", None, PARAMS, tx),
    ):
        with subtests.test(what), pytest.raises(ValueError, match="state must"):
            convert.change_storage(given, leaves, to)
    with pytest.raises(TypeError, match="tx must be an RMSProp"):
        convert.change_storage(state, PARAMS, optax.sgd(0.1))


def test_a_changed_state_is_placed_like_the_parameters():
    mesh = mesh_of(4)
    params, _, state = wide_state((4, 64))
    small = rmsprop(0.1, **FULL, storage=SMALL["q8"])
    want = convert.change_storage(state, params, small)
    sharded = jax.device_put(params, NamedSharding(mesh, P("x")))
    got = jax.block_until_ready(convert.change_storage(state, sharded, small))
    assert_same(jax.device_get(got), jax.device_get(want))
    for a, b in zip(*map(jax.tree.leaves, (got, small.init(sharded))), strict=True):
        assert a.sharding == b.sharding

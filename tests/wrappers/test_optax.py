"""Inside every wrapper of Optax, in each storage, compared with the rule alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import microbatching
import pytest

from helpers import assert_moved, assert_same
from rmsprop_jax import dialects, rmsprop
from rmsprop_jax._storage import Joined
from storages import (
    FULL,
    GRADS,
    PARAMS,
    SHAPES,
    SLOTS,
    SMALL,
    STORAGES,
    assert_as_plain,
    assert_near,
    each_storage,
    ours,
    plain,
    run,
    run_each,
    slot,
    types,
)

pytestmark = pytest.mark.usefixtures("default_promotion")  # for Optax

EVERYWHERE = dict.fromkeys(SHAPES, True)
WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("rms", tx)),
    "masked": lambda tx: optax.masked(tx, EVERYWHERE),
    "partition": lambda tx: optax.partition({"a": tx}, dict.fromkeys(SHAPES, "a")),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "with_extra_args_support": optax.with_extra_args_support,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "skip_not_finite": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "two of them": lambda tx: optax.chain(optax.apply_if_finite(optax.chain(tx), 3)),
}


@each_storage
def test_a_wrapper_that_lets_everything_through_changes_nothing(storage, subtests):
    tx = rmsprop(0.1, **FULL, storage=storage)
    runs = run_each({name: wrap(tx) for name, wrap in WRAPPERS.items()})
    for name, (params, state) in runs.items():
        with subtests.test(wrapper=name, storage=storage):
            assert_as_plain((params, ours(state)), storage)


@each_storage
def test_flatten_is_one_leaf_of_another_path(storage):
    def flat(tree):
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])

    tx = rmsprop(0.1, **FULL, storage=storage)
    params, state = run(optax.flatten(tx))
    want_params, want = run(tx, flat(PARAMS), list(map(flat, GRADS)))
    assert_same(ours(state), want)
    assert_same(flat(params), want_params)


@each_storage
def test_masked_keeps_no_state_for_the_others(storage):
    tx = optax.masked(rmsprop(0.1, **FULL, storage=storage), {"w": True, "b": False, "s": False})
    params, state = run(tx)
    (want_params, want), size = plain(storage), PARAMS["w"].size
    for field in SLOTS:
        held = getattr(ours(state), field)
        leaves = held.codes if isinstance(held, Joined) else held
        assert isinstance(leaves["b"], optax.MaskedNode)
        # Codes and a scale.
        assert size <= sum(leaf.size for leaf in jax.tree.leaves(held)) <= size + 1
        assert_same(slot(held, "w"), slot(getattr(want, field), "w"))
    assert_same(params["w"], want_params["w"])
    for name in "bs":  # which masked lets through as they are
        want = functools.reduce(np.add, [g[name] for g in GRADS], PARAMS[name])
        np.testing.assert_array_equal(params[name], want)


def test_partition_into_several_storages_and_another_optimizer():
    txs = {name: rmsprop(0.1, **FULL, storage=one) for name, one in STORAGES.items()}
    for labels in (
        {"w": "q8", "b": "bfloat16", "s": "float32"},
        {"w": "float32", "b": "sgd", "s": "bfloat16"},
    ):
        params, state = run(optax.partition(txs | {"sgd": optax.sgd(0.5)}, labels))
        for leaf, label in labels.items():
            if label == "sgd":
                moved = 0.5 * sum(g[leaf] for g in GRADS)
                np.testing.assert_allclose(params[leaf], PARAMS[leaf] - moved, rtol=1e-6, atol=1e-5)
                continue
            want_params, want = plain(STORAGES[label])
            inner = ours(state.inner_states[label])
            for field in SLOTS:
                assert_same(slot(getattr(inner, field), leaf), slot(getattr(want, field), leaf))
            assert_same(params[leaf], want_params[leaf])


@each_storage
def test_multi_steps_waits_for_the_mean_gradient(storage):
    """Two parts of a batch, one step: as if the batch had come at once."""
    tx = optax.MultiSteps(rmsprop(0.1, **FULL, storage=storage), 2)
    parts = [jax.tree.map(lambda g, s=s: np.float32(s) * g, g) for g in GRADS for s in (2, 0)]
    params, state = run(tx, grads=parts)
    assert_as_plain((params, ours(state)), storage)


@each_storage
def test_apply_if_finite_keeps_the_state_of_before(storage):
    tx = optax.apply_if_finite(rmsprop(0.1, **FULL, storage=storage), 3)
    params, state = run(tx)
    broken = GRADS[0] | {"b": GRADS[0]["b"].at[3].set(jnp.nan)}
    after, new = run(tx, params, [broken], state)
    assert_same(after, params)
    assert_same(ours(new), ours(state))
    assert int(new.total_notfinite) == 1


FACTORIES = {
    "rmsprop": functools.partial(rmsprop, learning_rate=0.1, **FULL),
    "pytorch": functools.partial(dialects.pytorch, lr=0.1, momentum=0.9, centered=True),
    "keras": functools.partial(dialects.keras, learning_rate=0.1, momentum=0.9),
    "tensorflow_v1": functools.partial(dialects.tensorflow_v1, learning_rate=0.1, momentum=0.9),
    "timm": functools.partial(dialects.timm, lr=0.1, momentum=0.9),
}


@each_storage
def test_injected_hyperparameters_change_no_bit(storage, subtests):
    """Where something is rounded at random; else a constant may be folded into a product.

    Of decays that float32 holds: the wrapper makes arrays of all numbers.
    """
    names = {"pytorch": "alpha", "timm": "alpha", "keras": "rho"}
    arguments = {
        name: factory.keywords | {names.get(name, "decay"): 0.875, "storage": storage}
        for name, factory in FACTORIES.items()
    }
    made = {name: factory.func(**arguments[name]) for name, factory in FACTORIES.items()}
    injected = {
        name: optax.inject_hyperparams(factory.func)(**arguments[name])
        for name, factory in FACTORIES.items()
    }
    wanted = run_each(made)
    for name, (params, state) in run_each(injected).items():
        with subtests.test(factory=name):
            assert_near((params, ours(state)), wanted[name], 0 if storage else 1e-6)


@each_storage
def test_an_injected_learning_rate_can_be_set(storage):
    tx = optax.inject_hyperparams(rmsprop)(learning_rate=0.1, **FULL, storage=storage)
    state = tx.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0)
    updates, new = jax.jit(tx.update)(GRADS[0], state, PARAMS)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    want = run(rmsprop(0.1, **FULL, storage=storage), grads=GRADS[:1])[1]
    assert_near(ours(new).nu, want.nu, 0 if storage else 1e-6)


@each_storage
def test_map_params_reaches_every_array_of_a_leaf_and_nothing_else(storage):
    tx = optax.chain(optax.clip(1.0), rmsprop(0.1, **FULL, storage=storage))
    _, state = run(tx)
    assert_same(optax.tree.map_params(tx, lambda leaf: leaf, state), state)
    seen = []
    optax.tree.map_params(tx, lambda leaf: seen.append(leaf) or leaf, state)
    fields = [getattr(ours(state), field) for field in SLOTS]
    trees = [field.codes if isinstance(field, Joined) else field for field in fields]
    assert {id(leaf) for leaf in seen} == {id(leaf) for leaf in jax.tree.leaves(trees)}
    halved = ours(optax.tree.map_params(tx, lambda leaf: leaf.astype(jnp.float16), state))
    assert halved.count.dtype == jnp.int32
    assert halved.weight_sum.dtype == jnp.float32
    changed = [getattr(halved, field) for field in SLOTS]
    trees = [field.codes if isinstance(field, Joined) else field for field in changed]
    assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype(jnp.float16)}


@each_storage
def test_tree_get_and_set_find_the_slots(storage):
    tx = optax.chain(optax.clip(1.0), rmsprop(0.1, **FULL, storage=storage))
    _, state = run(tx)
    for field in ("count", *SLOTS):
        assert optax.tree.get(state, field) is getattr(ours(state), field)
    fresh = tx.init(PARAMS)
    reset = optax.tree.set(state, nu=ours(fresh).nu)
    assert_same(ours(reset).nu, ours(fresh).nu)
    assert_same(ours(reset).trace, ours(state).trace)
    assert types(jax.eval_shape(tx.update, GRADS[0], reset, PARAMS)[1]) == types(state)


def test_tree_get_finds_the_parts_of_slots_in_8_bits():
    _, state = run(optax.chain(optax.clip(1.0), rmsprop(0.1, **FULL, storage=SMALL["q8"])))
    for part in ("codes", "scales"):
        found = [value for _, value in optax.tree.get_all_with_path(state, part)]
        wanted = [getattr(field, part) for field in (ours(state).nu, ours(state).trace)]
        assert {id(value) for value in found} == {id(value) for value in wanted}


def test_microbatching_inside_a_step():
    data = jnp.arange(8.0)

    def loss(params, x):
        return jnp.mean((params * x - 1) ** 2)

    gradient = microbatching.microbatch(
        jax.grad(loss),
        argnums=1,
        microbatch_size=2,
        accumulator=microbatching.AccumulationType.MEAN,
    )
    tx = rmsprop(0.1)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params, data), state)
        return optax.apply_updates(params, updates), state

    start = jnp.asarray(0.0)
    params, state = step(start, tx.init(start))
    want, _ = tx.update(jax.grad(loss)(start, data), tx.init(start))
    np.testing.assert_allclose(params, want, rtol=1e-6)
    assert int(state.count) == 1


@each_storage
def test_apply_if_finite_under_mixed_precision(storage):
    """bfloat16 parameters with float32 gradients: where optax's own state changes its dtype."""
    tx = optax.apply_if_finite(rmsprop(0.1, **FULL, storage=storage), 3)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    after, state = run(tx, params)
    assert int(ours(state).count) == len(GRADS)
    assert {leaf.dtype for leaf in after.values()} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.all(after[name] != params[name]) for name in params)


def test_extra_arguments_are_ignored():
    tx = rmsprop(0.1)
    state = tx.init(PARAMS)
    want = tx.update(GRADS[0], state)
    assert_moved(want)
    assert_same(tx.update(GRADS[0], state, PARAMS, value=1.0, grad_fn=None), want)


def test_the_state_is_found_by_its_name():
    """Where its count is not the only one, as under inject_hyperparams."""
    state = optax.inject_hyperparams(rmsprop)(0.1).init(PARAMS)
    with pytest.raises(KeyError, match="multiple values for 'count'"):
        optax.tree.get(state, "count")
    with pytest.raises(KeyError, match="multiple values for 'count'"):  # as everywhere in Optax
        optax.tree.get(optax.inject_hyperparams(optax.adam)(0.1).init(PARAMS), "count")
    assert optax.tree.get(state, "RMSPropState").count == 0
    assert len(optax.tree.get_all_with_path(state, "count")) == 2

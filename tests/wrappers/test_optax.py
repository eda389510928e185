"""In the place of optax.rmsprop: the same results, and a life inside every wrapper."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import microbatching
import pytest

from helpers import assert_close, gradients, run
import reference
import rmsprop_jax
from rmsprop_jax import rmsprop, scale_by_rms

GRID = [
    {"decay": decay, "eps": eps, "eps_in_sqrt": inside, **start, **buffer}
    for decay, eps, inside, start, buffer in itertools.product(
        (0.5, 0.9, 0.99, 0.999),
        (1e-8, 1e-2),
        (True, False),
        ({}, {"initial_scale": 1.0}, {"bias_correction": True}),
        ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    )
]


@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
@pytest.mark.parametrize("kwargs", GRID, ids=str)
def test_same_trajectories(kwargs, schedule):
    """1e-11 in float64 and 1e-5 in float32, relative and of a learning rate.

    A decay of .999 is rounded to float32 for optax as well, which otherwise takes 1 - decay from
    the Python number: 1.3e-5 more. With bias correction optax's float32 1 - decay^t errs by up to
    6e-8 / (1 - decay), so there the other side is optax in float64.
    """
    learning_rate = optax.linear_schedule(0.01, 0.001, 20) if schedule else 0.01
    grads = gradients(30)
    with jax.enable_x64(True):
        want, _ = run(optax.rmsprop(learning_rate, **kwargs), grads)
        got, _ = run(rmsprop(learning_rate, **kwargs), grads)
    assert_close(got, want, 1e-11, 1e-11 * 0.01)

    grads32 = [g.astype(np.float32) for g in grads]
    rounded = kwargs | {"decay": np.float32(kwargs["decay"])}
    if kwargs.get("bias_correction"):
        with jax.enable_x64(True):
            rounded["decay"] = float(rounded["decay"])
            want, _ = run(optax.rmsprop(learning_rate, **rounded), [np.float64(g) for g in grads32])
    else:
        want, _ = run(optax.rmsprop(learning_rate, **rounded), grads32)
    got, _ = run(rmsprop(learning_rate, **kwargs), grads32)
    assert_close(got, want, 1e-5, 1e-5 * 0.01)


@pytest.mark.parametrize("kwargs", GRID, ids=str)
def test_same_centered_trajectories(kwargs):
    """In float64, with optax's v - m^2 where eps covers its cancellation, else the definition:
    bias-corrected, optax gives NaN from the first step even in float64.

    In float32 optax has few digits left, or NaN: test_equations has the definition there.
    """
    grads = gradients(30, low=-1, high=1)
    with jax.enable_x64(True):
        got, _ = run(rmsprop(0.01, centered=True, **kwargs), grads)
        if kwargs["eps"] == 1e-2 and not kwargs.get("bias_correction"):
            want, _ = run(optax.rmsprop(0.01, centered=True, **kwargs), grads)
        else:
            want = reference.run(grads, learning_rate=0.01, centered=True, **kwargs)
    assert_close(got, want, 1e-11, 1e-11 * 0.01)


def test_first_nine_parameters_are_optax_s():
    ours = list(inspect.signature(rmsprop).parameters.values())[:9]
    theirs = list(inspect.signature(optax.rmsprop).parameters.values())[:9]
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    ours = list(inspect.signature(scale_by_rms).parameters.values())[:5]
    theirs = list(inspect.signature(optax.scale_by_rms).parameters.values())
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


GRADS = {"w": jnp.asarray([[1.0, -2.0], [0.5, 0.0]]), "b": jnp.asarray([3.0, -1e-3])}
PARAMS = jax.tree.map(jnp.ones_like, GRADS)
FULL = {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "bias_correction": True}


def steps(tx, grads=GRADS, params=PARAMS, n=4):
    """n steps, jitted; the state keeps its types throughout."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(n):
        before = jax.tree.map(jnp.result_type, state)
        updates, state = update(grads, state, params)
        assert jax.tree.map(jnp.result_type, state) == before
        params = optax.apply_updates(params, updates)
    return params, state


WANT, _ = steps(rmsprop(0.1, **FULL))


def assert_same(got, want=WANT, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), got, want)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("rms", tx)),
    "masked everywhere": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "partition": lambda tx: optax.partition({"a": tx}, {"w": "a", "b": "a"}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "flatten": optax.flatten,
    "with_extra_args_support": optax.with_extra_args_support,
    "skip_not_finite": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_that_lets_everything_through_changes_nothing(wrap):
    assert_same(steps(wrap(rmsprop(0.1, **FULL)))[0])


def test_masked_leaves_the_others_alone():
    tx = optax.masked(rmsprop(0.1, **FULL), {"w": True, "b": False})
    params, state = steps(tx)
    assert_same(params["w"], WANT["w"])
    np.testing.assert_allclose(params["b"], 1 + 4 * GRADS["b"], rtol=1e-6)
    assert isinstance(state.inner_state.nu["b"], optax.MaskedNode)


def test_partition_by_label():
    tx = optax.partition(
        {"a": rmsprop(0.1, **FULL), "rest": optax.sgd(0.5)}, {"w": "a", "b": "rest"}
    )
    params, _ = steps(tx)
    assert_same(params["w"], WANT["w"])
    np.testing.assert_allclose(params["b"], 1 - 4 * 0.5 * GRADS["b"], rtol=1e-6)


def test_multi_steps_averages_gradients():
    """Two halves of a batch, one step: as if the batch had come at once."""
    tx = optax.MultiSteps(rmsprop(0.1, **FULL), every_k_schedule=2)
    state, params, want = tx.init(PARAMS), PARAMS, PARAMS
    plain = rmsprop(0.1, **FULL)
    plain_state = plain.init(PARAMS)
    for _ in range(3):
        for scale in (0.5, 1.5):
            updates, state = tx.update(jax.tree.map(lambda g, s=scale: s * g, GRADS), state, params)
            params = optax.apply_updates(params, updates)
        updates, plain_state = plain.update(GRADS, plain_state, want)
        want = optax.apply_updates(want, updates)
    assert_same(params, want)


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

    params, state = step(jnp.asarray(0.0), tx.init(jnp.asarray(0.0)))
    want, _ = tx.update(jax.grad(loss)(jnp.asarray(0.0), data), tx.init(jnp.asarray(0.0)))
    np.testing.assert_allclose(params, want, rtol=1e-6)
    assert int(state.count) == 1


def test_apply_if_finite_under_mixed_precision():
    """bfloat16 parameters with float32 gradients: where optax's own state changes its dtype."""
    tx = optax.apply_if_finite(rmsprop(0.1, **FULL), 3)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    steps(tx, GRADS, params)


def test_map_params_touches_the_slots_only():
    tx = optax.chain(optax.clip(1.0), rmsprop(0.1, **FULL))
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(
        tx, lambda leaf: leaf + 1, state, transform_non_params=lambda leaf: leaf
    )
    _, (before, after) = None, (state[1], mapped[1])
    for slot in ("nu", "mu", "trace"):
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b + 1),
            getattr(after, slot),
            getattr(before, slot),
        )
    assert int(after.count) == 0
    assert float(after.weight_sum) == 0


def test_tree_get_finds_the_slots():
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(0.1, **FULL))
    state = tx.init(PARAMS)
    for slot in ("count", "nu", "mu", "trace"):
        assert optax.tree.get(state, slot) is getattr(state[1], slot)
    reset = optax.tree.set(state, nu=jax.tree.map(jnp.ones_like, PARAMS))
    assert float(reset[1].nu["b"][0]) == 1


def test_extra_arguments_are_ignored():
    tx = rmsprop(0.1)
    want = tx.update(GRADS, tx.init(PARAMS))
    got = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0, grad_fn=None)
    assert_same(got, want)


def test_public_names():
    assert set(rmsprop_jax.__all__) == {
        "RMSPropState",
        "convert",
        "describe",
        "dialects",
        "low_memory",
        "recipes",
        "rmsprop",
        "scale_by_rms",
        "sharding",
    }
    for name in rmsprop_jax.__all__:
        assert getattr(rmsprop_jax, name).__doc__

"""Numbers, arrays and schedules as hyperparameters: bit-identical, without recompilation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_moved, gradients, run
from rmsprop_jax import dialects, rmsprop, scale_by_rms

VALUES = {
    "learning_rate": 0.013,
    "decay": 0.9375,  # which float32 holds
    "eps": 1e-6,
    "momentum": 0.87,
    "weight_decay": 0.02,
}
FORMS = {
    str(form): form
    for form in (
        {},
        {"eps_in_sqrt": False},
        {"centered": True},
        {"nesterov": True},
        {"lr_in_momentum": False},
        {"bias_correction": True},
        {"bias_correction": True, "centered": True},
        {"decoupled_weight_decay": True},
        {"cautious": True},
    )
}


def trajectories(make, arrays, grads, jit):
    """Updates and final states of all forms, whose transformations are built anew in every step."""

    def update(g, states, x, arrays):
        runs = {n: make(arrays, form).update(g, states[n], x) for n, form in FORMS.items()}
        return {n: u for n, (u, _) in runs.items()}, {n: state for n, (_, state) in runs.items()}

    update = jax.jit(update) if jit else update
    x = np.ones_like(grads[0])
    states = {name: make(arrays, form).init(x) for name, form in FORMS.items()}
    updates = []
    for g in grads:
        u, states = update(g, states, x, arrays)
        updates.append(jax.device_get(u))
    states = jax.device_get(states)
    return {name: ([u[name] for u in updates], states[name]) for name in FORMS}


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_three_ways_and_two_modes_give_the_same_bits(dtype, subtests):
    with jax.enable_x64(dtype == "float64"):
        grads = gradients(12, low=-3, high=2, dtype=np.dtype(dtype))
        precise = np.float64 if dtype == "float64" else np.float32
        arrays = {name: jnp.asarray(value, precise) for name, value in VALUES.items()}
        ways = {
            "number": lambda _, form: rmsprop(**VALUES, **form),
            "array": lambda arrays, form: rmsprop(**arrays, **form),
            "schedule of numbers": lambda _, form: rmsprop(
                **{name: lambda count, v=v: v for name, v in VALUES.items()}, **form
            ),
            "schedule of arrays": lambda _, form: rmsprop(
                **{n: lambda count, v=v: jnp.asarray(v, precise) for n, v in VALUES.items()},
                **form,
            ),
        }
        want = trajectories(ways["number"], arrays, grads, jit=False)
        for (way, make), jit in itertools.product(ways.items(), (False, True)):
            for form, got in trajectories(make, arrays, grads, jit).items():
                with subtests.test(form=form, dtype=dtype, way=way, jit=jit):
                    assert_moved(got[1])
                    jax.tree.map(np.testing.assert_array_equal, got, want[form])


def test_new_values_compile_nothing_anew():
    traces = []

    @jax.jit
    def update(g, state, hyper):
        traces.append(1)
        return rmsprop(**hyper).update(g, state, g)

    g = jnp.ones(3)
    hyper = {name: jnp.float32(value) for name, value in VALUES.items()}
    state = rmsprop(**hyper).init(g)
    for factor in (1.0, 0.5, 0.0):
        _, state = update(g, state, {name: factor * value for name, value in hyper.items()})
    assert len(traces) == 1


def test_an_eager_update_compiles_each_shape_once_however_often_it_is_built():
    from rmsprop_jax import _equations

    tree = {"a": jnp.ones((3, 5)), "b": jnp.ones((3, 5)), "c": jnp.ones(11)}
    state = rmsprop(0.1).init(tree)
    rmsprop(0.1).update(tree, state)
    before = _equations.step._cache_size()
    for learning_rate in (0.2, 0.3, jnp.float32(0.4)):
        rmsprop(learning_rate).update(tree, state)
    assert _equations.step._cache_size() == before


def test_vmap_over_a_population():
    """One compiled program trains many hyperparameters at once, each as if alone."""
    grads = jnp.asarray(np.stack(gradients(5, (7,), dtype=np.float32, low=-2, high=1)))
    population = {
        "learning_rate": jnp.asarray([0.1, 0.01, 1.0]),
        "decay": jnp.asarray([0.9, 0.0, 0.99]),
        "eps": jnp.asarray([1e-8, 1e-2, 1.0]),
        "momentum": jnp.asarray([0.9, 0.5, 0.0]),
        "weight_decay": jnp.asarray([0.0, 0.1, 0.01]),
    }

    @jax.jit
    def train(hyper):
        tx = rmsprop(**hyper, centered=True)
        x = jnp.ones(7)

        def step(carry, g):
            x, state = carry
            u, state = tx.update(g, state, x)
            return (optax.apply_updates(x, u), state), u

        return jax.lax.scan(step, (x, tx.init(x)), grads)[1]

    together = np.asarray(jax.vmap(train)(population))
    assert np.all(together[0] != together[1])
    for i in range(3):
        alone = train({name: values[i] for name, values in population.items()})
        np.testing.assert_allclose(together[i], alone, rtol=2e-6, atol=1e-9)
    assert train._cache_size() == 1


def test_schedules_see_the_count_of_earlier_steps():
    seen = []
    tx = rmsprop(lambda count: seen.append(int(count)) or 0.1)
    state = tx.init(jnp.ones(2))
    for _ in range(3):
        _, state = tx.update(jnp.ones(2), state)
    assert seen == [0, 1, 2]
    assert int(state.count) == 3


def test_the_count_stops_at_its_largest_value():
    tx = rmsprop(0.1)
    state = tx.init(jnp.ones(2))._replace(count=jnp.int32(2**31 - 3))
    for left in (2, 1, 1):
        _, state = tx.update(jnp.ones(2), state)
        assert int(state.count) == 2**31 - left


def test_bias_correction_is_exact_under_a_scheduled_decay():
    """Constant gradients have the root mean square |g|, whatever the weights."""
    tx = rmsprop(1.0, decay=lambda count: 1 - 0.5 / (1 + count), eps=0.0, bias_correction=True)
    state = tx.init(jnp.zeros(2))
    for _ in range(20):
        updates, state = tx.update(jnp.asarray([4.0, -0.25]), state)
        np.testing.assert_allclose(updates, [-1, 1], rtol=1e-6)


def test_bias_correction_moves_nothing_while_the_decay_is_one():
    tx = rmsprop(0.1, decay=jnp.float32(1.0), bias_correction=True)
    state = tx.init(jnp.ones(3))
    for _ in range(3):
        updates, state = tx.update(jnp.ones(3), state)
        np.testing.assert_array_equal(updates, 0)


def test_a_float64_number_leaves_float32_updates_alone():
    with jax.enable_x64(True):
        tx = rmsprop(np.float64(0.1), decay=np.float64(0.9))
        g = jnp.ones(3, jnp.float32)
        updates, state = tx.update(g, tx.init(g))
        assert updates.dtype == state.nu.dtype == jnp.float32
        np.testing.assert_allclose(state.nu, 0.1, rtol=1e-6)


def test_an_injected_decay_keeps_its_precision_beside_bfloat16():
    """optax injects in the parameters' dtype, where .999 is 1; hyperparam_dtype says otherwise."""
    g = jnp.ones(3, jnp.bfloat16)
    make = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)
    tx = make(learning_rate=0.1, decay=0.999)
    state = tx.init(g)
    for _ in range(5000):
        _, state = tx.update(g, state)
    np.testing.assert_allclose(state.inner_state.nu, 1 - 0.999**5000, rtol=1e-4)


def test_all_hyperparameters_can_be_injected():
    make = optax.inject_hyperparams(rmsprop)
    tx = make(**VALUES, initial_scale=0.5)
    g = jnp.asarray([1.0, -2.0])
    state = tx.init(g)
    assert set(state.hyperparams) == {*VALUES, "initial_scale"}
    plain = rmsprop(**VALUES, initial_scale=0.5)
    want, _ = plain.update(g, plain.init(g), g)
    for update in (tx.update, jax.jit(tx.update)):
        np.testing.assert_array_equal(update(g, state, g)[0], want)
    state.hyperparams["learning_rate"] = jnp.float32(2 * VALUES["learning_rate"])
    assert_moved(plain.update(g, plain.init(g), g))
    twice, _ = rmsprop(
        **VALUES | {"learning_rate": 2 * VALUES["learning_rate"]}, initial_scale=0.5
    ).update(g, plain.init(g), g)
    np.testing.assert_array_equal(tx.update(g, state, g)[0], twice)


def test_scale_by_rms_takes_schedules_too():
    tx = scale_by_rms(decay=optax.linear_schedule(0.5, 0.9, 10), eps=lambda count: 1e-3)
    g = jnp.ones(2)
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates, 1 / np.sqrt(0.5 + 1e-3), rtol=1e-6)


@pytest.mark.parametrize("lr_in_momentum", [True, False])
def test_a_decay_of_one_at_first_leaves_the_buffer_empty(lr_in_momentum):
    tx = rmsprop(
        0.1,
        decay=lambda count: jnp.where(count < 2, 1.0, 0.9),
        momentum=0.9,
        bias_correction=True,
        lr_in_momentum=lr_in_momentum,
        eps=0.0,
    )
    state = tx.init(jnp.ones(1))
    for want in (0.0, 0.0, -0.1, -0.19):
        updates, state = tx.update(jnp.ones(1), state)
        np.testing.assert_allclose(updates, want, rtol=1e-6)


def test_of_complex_hyperparameters_the_real_part_counts():
    """``optax.inject_hyperparams`` gives all numbers the dtype of the widest parameter."""
    grads = np.asarray([3 - 4j, 1j], np.complex64)
    for theirs, ours in (
        (optax.rmsprop(0.1), optax.inject_hyperparams(rmsprop)(0.1)),
        (
            optax.rmsprop(0.1, momentum=0.9, centered=True, eps=0.1),
            optax.inject_hyperparams(rmsprop)(0.1, momentum=0.9, centered=True, eps=0.1),
        ),
        (
            optax.rmsprop(lambda count: 0.1 / (1 + count)),
            optax.inject_hyperparams(rmsprop)(lambda count: 0.1 / (1 + count)),
        ),
    ):
        with jax.numpy_dtype_promotion("standard"):
            got, _ = run(ours, [grads, 2 * grads], grads)
            want, _ = run(theirs, [grads, 2 * grads], grads)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_integer_arrays_are_numbers_that_do_not_overflow():
    """Of a count near its largest: 3 * 2^30 is no int32."""
    g = jnp.ones(2)
    for array, number in (
        (dialects.keras_legacy(decay=jnp.int32(3)), dialects.keras_legacy(decay=3.0)),
        (
            dialects.timm(
                jnp.int32(50_000),
                weight_decay=jnp.int32(50_000),
                decoupled_decay=True,
                corrected_weight_decay=True,
                initial_lr=1.0,
            ),
            dialects.timm(
                50_000.0,
                weight_decay=50_000.0,
                decoupled_decay=True,
                corrected_weight_decay=True,
                initial_lr=1.0,
            ),
        ),
        (rmsprop(jnp.int32(2), jnp.int32(0), momentum=jnp.int32(1)), rmsprop(2, 0, momentum=1)),
    ):
        states = [tx.init(g)._replace(count=jnp.int32(2**30)) for tx in (array, number)]
        got, want = (tx.update(g, s, g)[0] for tx, s in zip((array, number), states, strict=True))
        np.testing.assert_array_equal(got, want)

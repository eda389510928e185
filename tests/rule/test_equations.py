"""Every form of the rule, compared with the loop of reference.py.

Tolerances: in float64, 1e-11 relative (the library's rounding is a thousand times coarser than the
loop's long double); in float32, 5e-5 relative and 5e-5 of a learning rate.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_close, gradients, run, run_all
import reference
from rmsprop_jax import rmsprop, scale_by_rms

FORMS = [
    {"eps": 1e-3, "eps_in_sqrt": inside, "centered": centered, **start, **buffer, **pull}
    for inside, centered, start, buffer, pull in itertools.product(
        (True, False),
        (True, False),
        ({}, {"bias_correction": True}),
        (
            {},
            {"momentum": 0.9},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.9, "lr_in_momentum": False},
            {"momentum": 0.9, "cautious": True},
        ),
        ({}, {"weight_decay": 0.01}, {"weight_decay": 0.01, "decoupled_weight_decay": True}),
    )
]
START = np.linspace(-1, 1, 40)


def assert_equal(subtests, forms, grads, x=None, rate=0.01, rtol=1e-11, atol=1e-13):
    """All forms in one program, each against the loop; parts of complex numbers one by one."""
    dtype = grads[0].dtype
    with jax.enable_x64(np.finfo(dtype).bits == 64):
        txs = {str(form): rmsprop(**{"learning_rate": rate} | form) for form in forms}
        got, states = run_all(txs, grads, x)
    for form in forms:
        with subtests.test(form=form, dtype=dtype.name):
            want = reference.run(grads, x, **{"learning_rate": rate} | form)
            parts = (np.real, np.imag) if form.get("split_complex") else (np.asarray,)
            for part in parts:
                assert_close(map(part, got[str(form)]), map(part, want), rtol, atol)
    return states


def test_float64(subtests):
    assert_equal(subtests, FORMS, gradients(30), START)


def test_float32(subtests):
    grads = gradients(30, dtype=np.float32)
    assert_equal(subtests, FORMS, grads, START.astype(np.float32), rtol=5e-5, atol=5e-5 * 0.01)


def test_maximize(subtests):
    """The gradient is negated before weight decay joins it, which still pulls towards 0."""
    forms = [form | {"maximize": True} for form in FORMS]
    assert_equal(subtests, forms, gradients(30), START)


def test_split_complex_is_a_pair_of_real_numbers(subtests):
    forms = [form | {"split_complex": True} for form in FORMS if "cautious" not in form]
    grads = gradients(30, dtype=np.complex128, low=-3, high=3)
    states = assert_equal(subtests, forms, grads, START * (1 - 2j))
    assert {state.nu.dtype for state in states.values()} == {np.dtype(np.complex128)}


def test_initial_scale_is_nu_before_the_first_step_and_nothing_else(subtests):
    """So what holds of a form holds of it with any start: the program of its update is the same."""
    g = np.ones(3, np.float32)
    for form in FORMS:
        if form.get("bias_correction"):
            continue
        with subtests.test(form=form):
            plain, other = rmsprop(0.01, **form), rmsprop(0.01, initial_scale=0.5, **form)
            before, state = plain.init(g), other.init(g)
            np.testing.assert_array_equal(state.nu, 0.5)
            jax.tree.map(np.testing.assert_array_equal, state._replace(nu=before.nu), before)
            programs = [str(jax.make_jaxpr(tx.update)(g, state, g)) for tx in (plain, other)]
            assert programs[0] == programs[1]


def test_the_start_of_a_pair_of_real_numbers_is_that_of_both():
    z = np.ones(3, np.complex64)
    pair = rmsprop(0.01, initial_scale=0.5, split_complex=True).init(z)
    np.testing.assert_array_equal(pair.nu, np.full(3, 0.5 + 0.5j, np.complex64))
    whole = rmsprop(0.01, initial_scale=0.5).init(z)
    np.testing.assert_array_equal(whole.nu, np.full(3, 0.5, np.float32))


def test_cautious_steps_grow_a_thousandfold_at_most(subtests):
    """Where fewer than one in a thousand numbers agrees with its gradient."""
    signs = -np.ones(4000)
    signs[7] = 1
    form = {"eps": 1e-3, "momentum": 0.9, "cautious": True}
    grads = [np.ones(4000), 1e-3 * signs]
    assert_equal(subtests, [form], grads)
    updates, _ = run(rmsprop(3e38, **form), np.float32(grads))
    assert np.all(np.isfinite(updates))  # where a thousandfold is beyond the largest number


def test_cautious_with_a_learning_rate_that_may_be_negative(subtests):
    """It is right up the gradient then; 0 takes the buffer's steps as a positive one does."""
    forms = [
        {"eps": 1e-3, "momentum": 0.9, "cautious": True, "nesterov": nesterov, **others}
        for nesterov in (False, True)
        for others in ({}, {"lr_in_momentum": False}, {"maximize": True, "centered": True})
    ]
    assert_equal(subtests, forms, gradients(30), START, rate=-0.01)
    rates = np.resize(np.repeat([0.01, -0.01, 0, -0.02], 4), 30)
    with jax.enable_x64(True):
        table = jnp.asarray(rates)
        txs = {str(form): rmsprop(lambda count: table[count], **form) for form in forms}
        got, _ = run_all(txs, gradients(30), START)
    for form in forms:
        with subtests.test(form=form, rate="scheduled"):
            want = reference.run(gradients(30), START, learning_rate=rates, **form)
            assert_close(got[str(form)], want, 1e-11, 1e-13)


def test_every_decay(subtests):
    forms = [
        {"decay": decay, "centered": centered, "initial_scale": 1.0, "eps": 1e-2}
        for decay in (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)
        for centered in (False, True)
    ]
    assert_equal(subtests, forms, gradients(60, low=-1, high=1), rate=0.1)


def test_schedules(subtests):
    """All five hyperparameters change every step; bias correction stays a weighted mean."""
    steps = 40
    t = np.arange(steps)
    values = {
        "learning_rate": 0.1 / (1 + t),
        "decay": 1 - 0.5 / (1 + t) ** 0.5,
        "eps": 1e-2 * 0.9**t,
        "weight_decay": 0.01 * t,
        "momentum": 0.9 - 0.5 * 0.8**t,
    }
    with jax.enable_x64(True):
        tables = {name: jnp.asarray(of) for name, of in values.items()}
    schedules = {name: lambda count, of=of: of[count] for name, of in tables.items()}
    grads = gradients(steps, low=-1, high=1)
    txs, wanted = {}, {}
    for buffer, corrected, centered in itertools.product(
        ({}, {"lr_in_momentum": True}, {"lr_in_momentum": False}), (False, True), (False, True)
    ):
        form = buffer | {"bias_correction": corrected, "centered": centered}
        names = [name for name in values if buffer or name != "momentum"]
        txs[str(form)] = rmsprop(**{name: schedules[name] for name in names}, **form)
        wanted[str(form)] = reference.run(grads, START, **{n: values[n] for n in names}, **form)
    with jax.enable_x64(True):
        got, _ = run_all(txs, grads, START)
    for form, want in wanted.items():
        with subtests.test(form=form):
            assert_close(got[form], want, 1e-11, 1e-13)


def test_complex_uses_the_squared_modulus(subtests):
    forms = [
        {"eps": 1e-3} | form
        for form in ({}, {"centered": True, "momentum": 0.9}, {"momentum": 0.9, "cautious": True})
    ]
    grads = gradients(30, dtype=np.complex64, low=-3, high=3)
    states = assert_equal(subtests, forms, grads, rtol=5e-5, atol=5e-5 * 0.01)
    assert {state.nu.dtype for state in states.values()} == {np.dtype(np.float32)}
    grads = gradients(30, dtype=np.complex128, low=-3, high=3)
    (state,) = assert_equal(subtests, [{"eps": 1e-3, "momentum": 0.9}], grads).values()
    assert (state.nu.dtype, state.trace.dtype) == (np.float64, np.complex128)


def test_scale_by_rms_is_rmsprop_without_a_learning_rate():
    grads = gradients(20, dtype=np.float32)
    kwargs = {"decay": 0.95, "eps": 1e-6, "initial_scale": 0.5, "eps_in_sqrt": False}
    got, _ = run(scale_by_rms(**kwargs, centered=True), grads)
    want = reference.run(grads, learning_rate=-1.0, **kwargs, centered=True)
    assert_close(got, want, 5e-5, 5e-5)


def test_without_memory_it_is_sign_descent():
    """decay = 0 and eps = 0 leave g / |g|, exactly: in every dtype, for every size of g."""
    g = np.asarray([3.0, -1e-3, 1e15, 0.0, -1e-15], np.float32)
    u, _ = run(rmsprop(0.5, decay=0.0, eps=0.0), [g])
    np.testing.assert_allclose(u[0], -0.5 * np.sign(g), rtol=2e-7)


def test_centered_equals_plain_where_the_mean_is_zero():
    """With decay 1/2 and g, -g, g, ... the mean tends to g/3, so compare with the definition."""
    with jax.enable_x64(True):
        g = np.asarray([2.0, 0.5])
        centered, state = run(rmsprop(0.1, decay=0.5, centered=True, eps=0.0), [g, -g] * 40)
        second = state.nu + state.mu**2
    np.testing.assert_allclose(second, g**2, rtol=1e-11)
    np.testing.assert_allclose(state.mu, -g / 3, rtol=1e-11)
    np.testing.assert_allclose(centered[-1], 0.1 / np.sqrt(8 / 9), rtol=1e-11)


@pytest.mark.usefixtures("default_promotion")  # for Optax
def test_bias_corrected_without_eps_is_adam_without_memory_of_the_mean():
    """Adam(b1=0) divides by 1 - b2^t; in float64 the two agree to rounding."""
    grads = gradients(200, low=-2, high=2)
    with jax.enable_x64(True):
        got, _ = run(rmsprop(0.01, decay=0.999, eps_in_sqrt=False, bias_correction=True), grads)
        want, _ = run(optax.adam(0.01, b1=0.0, b2=0.999, eps=1e-8), grads)
    assert_close(got, want, 1e-11, 1e-15)


def test_variance_does_not_cancel():
    """At mean / std = 1e4, float32's v - m^2 is noise; the recursion keeps four digits."""
    rng = np.random.default_rng(0)
    grads = [(1 + 1e-4 * rng.standard_normal(1000)).astype(np.float32) for _ in range(300)]
    _, state = run(rmsprop(0.1, centered=True), grads)
    weights = 0.1 * 0.9 ** np.arange(300)[::-1]
    history = np.asarray(grads, np.longdouble)
    mean = np.tensordot(weights, history, 1)
    want = np.tensordot(weights, history**2, 1) - mean**2
    assert np.min(state.nu) > 0
    error = np.abs(np.asarray(state.nu) / want - 1)
    assert np.median(error) < 1e-3
    assert np.max(error) < 1e-2

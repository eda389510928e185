"""Every form of the rule against the loop of reference.py.

Tolerances: in float64, 1e-11 relative (the library rounds some thousand times less finely than
the loop's long double); in float32, 5e-5 relative and 5e-5 of a learning rate.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import assert_close, gradients, run
import reference
from rmsprop_jax import rmsprop, scale_by_rms

GRID = [
    {"eps": 1e-3, "eps_in_sqrt": inside, "centered": centered, **start, **buffer, **pull}
    for inside, centered, start, buffer, pull in itertools.product(
        (True, False),
        (True, False),
        ({}, {"initial_scale": 1.0}, {"bias_correction": True}),
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


@pytest.mark.parametrize("kwargs", GRID, ids=str)
def test_float64(kwargs):
    grads = gradients(30)
    x = np.linspace(-1, 1, 40)
    with jax.enable_x64(True):
        got, _ = run(rmsprop(0.01, **kwargs), grads, x)
    want = reference.run(grads, x, learning_rate=0.01, **kwargs)
    assert_close(got, want, 1e-11, 1e-13)


@pytest.mark.parametrize("kwargs", GRID, ids=str)
def test_float32(kwargs):
    grads = gradients(30, dtype=np.float32)
    x = np.linspace(-1, 1, 40).astype(np.float32)
    got, _ = run(rmsprop(0.01, **kwargs), grads, x)
    want = reference.run(grads, x, learning_rate=0.01, **kwargs)
    assert_close(got, want, 5e-5, 5e-5 * 0.01)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("centered", [False, True])
def test_every_decay(decay, centered):
    grads = gradients(60, low=-1, high=1)
    kwargs = {"decay": decay, "centered": centered, "initial_scale": 1.0, "eps": 1e-2}
    with jax.enable_x64(True):
        got, _ = run(rmsprop(0.1, **kwargs), grads)
    assert_close(got, reference.run(grads, learning_rate=0.1, **kwargs), 1e-11, 1e-13)


@pytest.mark.parametrize(
    "momentum", [{}, {"momentum": 0.9}, {"momentum": 0.9, "lr_in_momentum": False}]
)
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_schedules(momentum, bias_correction, centered):
    """All five hyperparameters change every step; bias correction stays a weighted mean."""
    steps = 40
    t = np.arange(steps)
    schedules = {
        "learning_rate": 0.1 / (1 + t),
        "decay": 1 - 0.5 / (1 + t) ** 0.5,
        "eps": 1e-2 * 0.9**t,
        "weight_decay": 0.01 * t,
    }
    kwargs = {"bias_correction": bias_correction, "centered": centered}
    if momentum:
        schedules["momentum"] = 0.9 - 0.5 * 0.8**t
        kwargs["lr_in_momentum"] = momentum.get("lr_in_momentum", True)
    grads = gradients(steps, low=-1, high=1)
    x = np.linspace(-1, 1, 40)
    with jax.enable_x64(True):
        tables = {name: jnp.asarray(values) for name, values in schedules.items()}
        as_schedules = {name: lambda count, v=v: v[count] for name, v in tables.items()}
        got, _ = run(rmsprop(**as_schedules, **kwargs), grads, x)
    assert_close(got, reference.run(grads, x, **schedules, **kwargs), 1e-11, 1e-13)


def test_complex_uses_the_squared_modulus():
    grads = gradients(30, dtype=np.complex64, low=-3, high=3)
    for kwargs in ({}, {"centered": True, "momentum": 0.9}, {"momentum": 0.9, "cautious": True}):
        got, state = run(rmsprop(0.01, eps=1e-3, **kwargs), grads)
        assert state.nu.dtype == jnp.float32
        want = reference.run(grads, learning_rate=0.01, eps=1e-3, **kwargs)
        assert_close(got, want, 5e-5, 5e-5 * 0.01)


def test_complex128_in_float64():
    grads = gradients(30, dtype=np.complex128, low=-3, high=3)
    with jax.enable_x64(True):
        got, state = run(rmsprop(0.01, eps=1e-3, momentum=0.9), grads)
        assert state.nu.dtype == jnp.float64
        assert state.trace.dtype == jnp.complex128
    assert_close(
        got, reference.run(grads, learning_rate=0.01, eps=1e-3, momentum=0.9), 1e-11, 1e-13
    )


@pytest.mark.parametrize("kwargs", [k for k in GRID if "cautious" not in k], ids=str)
def test_split_complex_is_a_pair_of_real_numbers(kwargs):
    grads = gradients(30, dtype=np.complex128, low=-3, high=3)
    x = np.linspace(-1, 1, 40) * (1 - 2j)
    with jax.enable_x64(True):
        got, state = run(rmsprop(0.01, split_complex=True, **kwargs), grads, x)
        assert state.nu.dtype == jnp.complex128
    want = reference.run(grads, x, learning_rate=0.01, split_complex=True, **kwargs)
    for part in (np.real, np.imag):
        assert_close(map(part, got), map(part, want), 1e-11, 1e-13)


@pytest.mark.parametrize("kwargs", GRID, ids=str)
def test_maximize(kwargs):
    """The gradient is negated before weight decay joins it, which still pulls towards 0."""
    grads = gradients(30)
    x = np.linspace(-1, 1, 40)
    with jax.enable_x64(True):
        got, _ = run(rmsprop(0.01, maximize=True, **kwargs), grads, x)
    want = reference.run(grads, x, learning_rate=0.01, maximize=True, **kwargs)
    assert_close(got, want, 1e-11, 1e-13)


def test_scale_by_rms_is_rmsprop_without_a_learning_rate():
    grads = gradients(20, dtype=np.float32)
    kwargs = {"decay": 0.95, "eps": 1e-6, "initial_scale": 0.5, "eps_in_sqrt": False}
    got, _ = run(scale_by_rms(**kwargs, centered=True), grads)
    want = reference.run(grads, learning_rate=-1.0, **kwargs, centered=True)
    assert_close(got, want, 5e-5, 5e-5)


def test_without_memory_it_is_sign_descent():
    """decay = 0 and eps = 0 leave g / |g|, exactly: in every dtype, for every size of g."""
    g = jnp.asarray([3.0, -1e-3, 1e15, 0.0, -1e-15])
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


def test_bias_corrected_without_eps_is_adam_without_memory_of_the_mean():
    """Adam(b1=0) divides by 1 - b2^t; in float64 the two agree to rounding."""
    import optax

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

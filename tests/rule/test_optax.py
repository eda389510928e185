"""As a replacement for optax.rmsprop: the same results from the same arguments."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_close, gradients, scan_all
import reference
from rmsprop_jax import rmsprop, scale_by_rms

pytestmark = pytest.mark.usefixtures("default_promotion")  # for Optax

RATES = {"constant": 0.01, "schedule": optax.linear_schedule(0.01, 0.001, 20)}
FORMS = [
    {"eps_in_sqrt": inside, **start, **buffer}
    for inside, start, buffer in itertools.product(
        (True, False),
        ({}, {"initial_scale": 1.0}, {"bias_correction": True}),
        ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    )
]
NUMBERS = list(itertools.product((0.5, 0.9, 0.99, 0.999), (1e-8, 1e-2)))  # decay and eps


@functools.partial(jax.jit, static_argnames=("make", "centered"))
def program(make, grads, decay, eps, centered):
    txs = {
        f"{rate} {form}": make(RATES[rate], decay, eps, centered=centered, **form)
        for rate in RATES
        for form in FORMS
    }
    return scan_all(txs, grads, jnp.zeros_like(grads[0]))[0]


def trajectories(make, grads, decay, eps, *, centered=False):
    return jax.device_get(program(make, grads, decay, eps, centered))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_same_trajectories(dtype, subtests):
    """1e-11 in float64 and 1e-5 in float32, relative and of a learning rate.

    With bias correction optax's float32 1 - decay^t errs by up to 6e-8 / (1 - decay), so there the
    other side is optax in float64.
    """
    rtol = 1e-11 if dtype == np.float64 else 1e-5
    grads = np.stack(gradients(30, dtype=dtype))
    for decay, eps in NUMBERS:
        numbers = np.asarray([decay, eps], dtype)
        with jax.enable_x64(True):
            precise = trajectories(optax.rmsprop, np.float64(grads), *np.float64(numbers))
        with jax.enable_x64(dtype == np.float64):
            got = trajectories(rmsprop, grads, *numbers)
            theirs = trajectories(optax.rmsprop, grads, *numbers)
        for form, updates in got.items():
            with subtests.test(form=form, decay=decay, eps=eps, dtype=dtype.__name__):
                want = precise if "bias_correction" in form else theirs
                assert updates.dtype == dtype
                assert_close(updates, want[form], rtol, rtol * 0.01)


def test_same_centered_trajectories(subtests):
    """In float64, with optax's v - m^2 where eps covers its cancellation, else the definition:
    bias-corrected, optax gives NaN from the first step even in float64.

    In float32 optax has few digits left, or NaN: test_equations has the definition there.
    """
    grads = gradients(30, low=-1, high=1)
    for decay, eps in NUMBERS:
        with jax.enable_x64(True):
            numbers = np.stack(grads), np.float64(decay), np.float64(eps)
            got = trajectories(rmsprop, *numbers, centered=True)
            theirs = trajectories(optax.rmsprop, *numbers, centered=True)
        for form in FORMS:
            with subtests.test(form=form, decay=decay, eps=eps):
                name = f"constant {form}"
                want = theirs[name]
                if eps < 1e-2 or form.get("bias_correction"):
                    options = {"decay": decay, "eps": eps, "centered": True} | form
                    want = reference.run(grads, learning_rate=0.01, **options)
                assert_close(got[name], want, 1e-11, 1e-11 * 0.01)


def test_first_nine_parameters_are_optax_s():
    ours = list(inspect.signature(rmsprop).parameters.values())[:9]
    theirs = list(inspect.signature(optax.rmsprop).parameters.values())[:9]
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    ours = list(inspect.signature(scale_by_rms).parameters.values())[:5]
    theirs = list(inspect.signature(optax.scale_by_rms).parameters.values())
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]

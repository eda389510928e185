"""Variational inference in BlackJAX: Stein variational gradient descent and a mean field."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import rmsprop_jax

blackjax = pytest.importorskip("blackjax")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_promotion")]


def logdensity(x):
    return -0.5 * (x["a"] - 1) ** 2 - 2 * (x["b"] + x["a"] ** 2) ** 2


def move_particles(tx):
    algorithm = blackjax.svgd(jax.grad(logdensity), tx)
    grid = jnp.linspace(-2, 2, 16)
    state = algorithm.init({"a": grid, "b": grid**2 - 1})
    for _ in range(20):
        state = algorithm.step(state)
    return state.particles


def fit_mean_field(tx):
    algorithm = blackjax.meanfield_vi(logdensity, tx, num_samples=8)
    state = algorithm.init({"a": jnp.array(0.0), "b": jnp.array(0.0)})
    step, elbos = jax.jit(algorithm.step), []
    for key in jax.random.split(jax.random.key(0), 20):
        state, info = step(key, state)
        elbos.append(info.elbo)
    return state.mu, state.rho, elbos


@pytest.mark.parametrize("run", [move_particles, fit_mean_field])
def test_inference_is_that_with_optax(run, form):
    """Measured: 3e-7."""
    ours, theirs = (run(rms(0.05, **form)) for rms in (rmsprop_jax.rmsprop, optax.rmsprop))
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=5e-6)

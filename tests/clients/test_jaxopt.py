"""The JAXopt solver that steps with an Optax transformation."""

import warnings

import chex
import jax.numpy as jnp
import optax
import pytest

import rmsprop_jax

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of being no longer maintained
    jaxopt = pytest.importorskip("jaxopt")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_promotion")]


def objective(x, target):
    return jnp.sum((x["a"] - target) ** 2) + (x["b"] - x["a"][0]) ** 4


def solve(tx):
    solver = jaxopt.OptaxSolver(objective, tx, maxiter=50)
    return solver.run({"a": jnp.array([3.0, -2.0]), "b": jnp.array(0.5)}, target=1.0)


def test_the_solution_is_that_with_optax(form):
    """Measured: 3e-7."""
    ours, theirs = (solve(rms(0.05, **form)) for rms in (rmsprop_jax.rmsprop, optax.rmsprop))
    assert ours.state.iter_num == theirs.state.iter_num == 50
    assert ours.state.error > 0
    chex.assert_trees_all_close(ours.params, theirs.params, rtol=2e-5, atol=5e-6)

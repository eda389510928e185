"""Optimistix, which minimises with an Optax transformation until the iterates converge."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import rmsprop_jax

optx = pytest.importorskip("optimistix")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_promotion")]

Y0 = {"a": jnp.array([3.0, -2.0]), "b": jnp.array(0.5)}


def objective(y, target):
    return jnp.sum((y["a"] - target) ** 2) + (y["b"] - y["a"][0]) ** 4


def minimise(tx, fn=objective):
    solver = optx.OptaxMinimiser(tx, rtol=1e-3, atol=1e-3)
    return optx.minimise(fn, solver, Y0, jnp.array(1.0), max_steps=500)


def test_the_minimum_is_that_with_optax(form):
    """After as many steps. Measured: the same bits."""
    ours, theirs = (minimise(rms(0.02, **form)) for rms in (rmsprop_jax.rmsprop, optax.rmsprop))
    assert ours.stats["num_steps"] == theirs.stats["num_steps"]
    chex.assert_trees_all_close(ours.value, theirs.value, rtol=2e-5)


@pytest.mark.parametrize("rmsprop", [rmsprop_jax.rmsprop, optax.rmsprop], ids=["ours", "theirs"])
def test_an_array_as_learning_rate_compiles_nothing_anew(rmsprop):
    traces = []

    def counted(y, target):
        traces.append(None)
        return objective(y, target)

    minimise(rmsprop(jnp.array(0.02)), counted)
    before = len(traces)
    minimise(rmsprop(jnp.array(0.05)), counted)
    assert len(traces) == before > 0


@pytest.mark.parametrize("rmsprop", [rmsprop_jax.rmsprop, optax.rmsprop], ids=["ours", "theirs"])
def test_the_minimum_has_no_derivative_by_the_learning_rate(rmsprop):
    """Optimistix differentiates by the implicit function theorem unless asked for another way."""

    def least(rate):
        return objective(minimise(rmsprop(rate)).value, 1.0)

    assert jax.grad(least)(0.02) == 0


def after_20_steps(tx):
    """The objective then, with a derivative through the steps."""
    solver = optx.OptaxMinimiser(tx, rtol=0.0, atol=0.0)
    adjoint = optx.RecursiveCheckpointAdjoint()
    target = jnp.array(1.0)
    last = optx.minimise(objective, solver, Y0, target, max_steps=20, throw=False, adjoint=adjoint)
    return objective(last.value, target)


@pytest.mark.parametrize(
    "transform",
    [
        lambda run: jax.jit(run)(0.02),
        lambda run: jax.jit(jax.vmap(run))(jnp.array([0.02, 0.05])),
        lambda run: jax.value_and_grad(run)(0.02),
    ],
    ids=["jit", "vmap", "grad"],
)
def test_the_learning_rate_may_be_traced(transform):
    """And differentiated, as far as Optimistix goes through its steps. Measured: 5e-7 of it."""
    ours, theirs = (
        transform(lambda rate, rms=rms: after_20_steps(rms(rate, momentum=0.9)))
        for rms in (rmsprop_jax.rmsprop, optax.rmsprop)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5)

"""A Haiku network, trained as in its documentation."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import rmsprop_jax

hk = pytest.importorskip("haiku")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_promotion")]

X = jnp.linspace(-1, 1, 64).reshape(32, 2)
NETWORK = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 2])(x)))


def loss_of(params):
    return jnp.mean((NETWORK.apply(params, X) - jnp.sin(3 * X)) ** 2)


def train(tx):
    @jax.jit
    def update(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = NETWORK.init(jax.random.key(0), X)
    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, loss = update(params, state)
        losses.append(loss)
    return params, losses


def test_training_is_that_with_optax(form):
    """Measured: 3e-7."""
    ours, theirs = (train(rms(0.01, **form)) for rms in (rmsprop_jax.rmsprop, optax.rmsprop))
    assert ours[1][-1] < 0.8 * ours[1][0]
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=5e-6)

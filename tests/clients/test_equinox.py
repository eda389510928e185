"""Equinox models, trained as in its documentation; some of their leaves are not floating."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmsprop_jax
from rmsprop_jax import low_memory

eqx = pytest.importorskip("equinox")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("default_promotion")]

X = jnp.linspace(-1, 1, 64).reshape(32, 2)
STEPS = 20


class Model(eqx.Module):
    """An MLP beside a typed key, for noise, and an integer."""

    mlp: eqx.nn.MLP
    key: jax.Array
    power: jax.Array

    def __init__(self):
        self.mlp = eqx.nn.MLP(2, 2, 16, depth=1, key=jax.random.key(0))
        self.key = jax.random.key(1)
        self.power = jnp.array(2)

    def __call__(self, x):
        noise = jax.random.normal(self.key, x.shape)
        return self.mlp(x + 0.01 * noise) ** self.power


def loss_of(model):
    return jnp.mean((jax.vmap(model)(X) - jnp.sin(X) ** 2) ** 2)


def train(tx, *, of_params=lambda model: eqx.filter(model, eqx.is_array), steps=STEPS):
    """The model, the state, the losses, and how often the step was traced."""
    traces = []

    @eqx.filter_jit
    def step(model, state):
        traces.append(None)
        loss, grads = eqx.filter_value_and_grad(loss_of)(model)
        updates, state = tx.update(grads, state, of_params(model))
        return eqx.apply_updates(model, updates), state, loss

    model = Model()
    state, losses = tx.init(eqx.filter(model, eqx.is_array)), []
    for _ in range(steps):
        model, state, loss = step(model, state)
        losses.append(loss)
    return model, state, losses, len(traces)


def floats(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


def test_training_is_that_with_optax(form):
    """Measured: losses 3e-6 of themselves, parameters 2e-7."""
    ours, _, our_losses, _ = train(rmsprop_jax.rmsprop(0.01, **form))
    theirs, _, their_losses, _ = train(optax.rmsprop(0.01, **form))
    assert our_losses[-1] < 0.8 * our_losses[0]
    chex.assert_trees_all_close(our_losses, their_losses, rtol=2e-5)
    chex.assert_trees_all_close(floats(ours), floats(theirs), rtol=2e-5, atol=5e-6)


def test_leaves_that_are_not_floating_stay_and_have_no_state():
    model, state, _, _ = train(rmsprop_jax.rmsprop(0.01, centered=True, momentum=0.9))
    assert model.power == 2
    assert model.key == jax.random.key(1)
    for slots in (state.nu, state.mu, state.trace):
        assert slots.key is None
        assert slots.power is None
        assert jax.tree.structure(floats(model)) == jax.tree.structure(jax.tree.leaves(slots))


def test_a_step_is_traced_once():
    """With optax.rmsprop twice: its state loses leaves whose gradient is None in the first step."""
    *_, traces = train(rmsprop_jax.rmsprop(0.01))
    assert traces == 1


@pytest.mark.parametrize("form", [{}, {"weight_decay": 0.1}], ids=["plain", "weight_decay"])
def test_parameters_may_be_the_whole_model(form):
    """With its functions, which no filter has taken out: Equinox's older examples pass it so."""
    tx = rmsprop_jax.rmsprop(0.01, **form)
    whole, filtered = train(tx, of_params=lambda model: model), train(tx)
    chex.assert_trees_all_equal(floats(whole[0]), floats(filtered[0]))


@pytest.mark.parametrize(
    "storage", [None, low_memory.bfloat16(), low_memory.q8()], ids=["float32", "bfloat16", "q8"]
)
def test_a_state_in_a_file(storage, tmp_path):
    """By tree_serialise_leaves, into a fresh state of the same shapes."""
    tx = rmsprop_jax.rmsprop(0.01, centered=True, momentum=0.9, storage=storage)
    _, state, _, _ = train(tx, steps=3)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    fresh = tx.init(eqx.filter(Model(), eqx.is_array))
    restored = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", fresh)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (fresh, state)), strict=True))
    chex.assert_trees_all_equal(restored, state)


def test_parameters_in_bfloat16_train_with_master_weights():
    """By Optax's apply_updates on the arrays: Equinox's own leaves what it adds in float32.

    Here the model has a key and an integer, and functions. Its losses are those in float32 to 2%;
    as bfloat16 is, they are not.
    """

    def half(x):
        return x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x

    def losses(tx, model):
        @eqx.filter_jit
        def step(model, state):
            loss, grads = eqx.filter_value_and_grad(loss_of)(model)
            params, static = eqx.partition(model, eqx.is_inexact_array)
            updates, state = tx.update(grads, state, params)
            return eqx.combine(optax.apply_updates(params, updates), static), state, loss

        state, found = tx.init(eqx.filter(model, eqx.is_inexact_array)), []
        for _ in range(300):
            model, state, loss = step(model, state)
            found.append(float(loss))
        return model, found

    tx = rmsprop_jax.rmsprop(1e-3)
    _, want = losses(tx, Model())
    model, found = losses(low_memory.master_weights(tx), jax.tree.map(half, Model()))
    assert {x.dtype for x in floats(model)} == {jnp.dtype(jnp.bfloat16)}
    _, stalled = losses(tx, jax.tree.map(half, Model()))
    assert want[-1] < 0.5 * want[0]
    assert abs(found[-1] / want[-1] - 1) < 0.02
    assert stalled[-1] / want[-1] - 1 > 0.1

    params, _ = eqx.partition(model, eqx.is_inexact_array)
    updates = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    assert {x.dtype for x in floats(eqx.apply_updates(model, updates))} == {jnp.dtype(jnp.float32)}

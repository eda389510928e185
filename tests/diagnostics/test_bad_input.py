"""What diagnostics refuses, and what the message names."""

import jax.numpy as jnp
import optax
import pytest

from rmsprop_jax import diagnostics, low_memory, rmsprop

TX = rmsprop(0.1)
PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
STATE = TX.init(PARAMS)


@pytest.mark.parametrize("tx", [optax.rmsprop(0.1), optax.chain(optax.clip(1.0)), None, 3])
def test_no_rmsprop(tx):
    with pytest.raises(TypeError, match="tx must be an RMSProp of rmsprop_jax or contain one"):
        diagnostics(tx, STATE)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "state must be one of tx, which has 1 RMSPropState in it, got 0"),
        (optax.sgd(0.1).init(PARAMS), "state must be one of tx, which has 1 RMSPropState in it"),
        ((STATE, STATE), "which has 1 RMSPropState in it, got 2"),
        (rmsprop(0.1, momentum=0.9).init(PARAMS), "state.trace must be None: this state was made"),
        (rmsprop(0.1, centered=True).init(PARAMS), "state.mu must be None: this state was made"),
        (TX.init({"w": jnp.ones((2, 4)), "b": jnp.ones(3)}), "of these parameters: nu of 'w' has"),
    ],
    ids=range(6),
)
def test_another_state(state, message):
    with pytest.raises(ValueError, match=message):
        diagnostics(TX, state, PARAMS)


def test_another_storage():
    state = rmsprop(0.1, storage=low_memory.q8()).init(PARAMS)
    with pytest.raises(TypeError, match=r"state\.nu must be of this storage, got EightBits"):
        diagnostics(TX, state, PARAMS)


def test_a_state_without_the_wrappers_numbers():
    tx = optax.inject_hyperparams(rmsprop)(0.1)
    state = tx.init(PARAMS)
    for other in (STATE, state._replace(hyperparams={})):
        with pytest.raises(ValueError, match="state must be one of tx, which has a number at 'hy"):
            diagnostics(tx, other, PARAMS)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"w": PARAMS["w"]}, "against params .tree 1.: missing .'b'., unexpected"),
        ({"w": jnp.ones(6), "b": jnp.ones(3)}, r"gradient float32\[6\], params float32\[2, 3\]"),
        ({"w": jnp.ones((2, 3), int), "b": jnp.ones(3)}, "gradient int32"),
    ],
    ids=range(3),
)
def test_gradients_that_are_not_like_params(grads, message):
    with pytest.raises(AssertionError, match=message):
        diagnostics(TX, STATE, PARAMS, grads)


def test_gradients_alone_are_held_against_the_state():
    with pytest.raises(ValueError, match=r"nu of 'w' has the shape \(2, 3\), and"):
        diagnostics(TX, STATE, grads={"w": jnp.ones(5), "b": jnp.ones(3)})


def test_a_flag_that_is_none():
    with pytest.raises(TypeError, match="per_leaf must be True or False, got 1"):
        diagnostics(TX, STATE, per_leaf=1)


def test_parameters_are_asked_for_where_a_wrapper_needs_them():
    def init(params):
        return TX.init(params["w"])

    tx = optax.GradientTransformation(init, TX.update)
    with pytest.raises(ValueError, match="params must be given: a wrapper in tx does not work"):
        diagnostics(tx, init(PARAMS))
    assert "below_eps" in diagnostics(tx, init(PARAMS), PARAMS)


def test_a_learning_rate_that_a_function_inside_a_wrapper_computes():
    tx = optax.inject_hyperparams(lambda base: rmsprop(2 * base))(base=0.1)
    with pytest.raises(ValueError, match="tx must pass hyperparameters on as they are in its st"):
        diagnostics(tx, tx.init(PARAMS))


def test_leaves_that_are_not_trained():
    """Integers have no state, and no gradient."""
    params = PARAMS | {"n": jnp.arange(3)}
    grads = PARAMS | {"n": None}
    told = diagnostics(TX, TX.init(params), params, grads, per_leaf=True)
    assert {name.split("/")[0] for name in told} == {"w", "b", "state"}

"""Conversions with ``optax.inject_hyperparams``, which keeps hyperparameters in its state."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_same
from rmsprop_jax import convert, describe, dialects, low_memory, rmsprop

pytestmark = pytest.mark.usefixtures("default_promotion")

PARAMS, MAPPING = {"w": jnp.ones(2)}, {"w": 0}
GROUP = {"lr": 0.01, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0.9, "params": [0]}
SLOTS = {"step": 5, "square_avg": [4.0, 9.0], "momentum_buffer": [1.0, -2.0]}
GIVEN = {"state": {0: SLOTS}, "param_groups": [GROUP]}
GRADS = {"w": jnp.array([3.0, -1.0])}
# As the page "From PyTorch" has it.
INJECTED = optax.inject_hyperparams(dialects.pytorch, static_args=("weight_decay", "momentum"))


def test_a_run_of_pytorch_goes_on_and_back():
    tx, plain = INJECTED(lr=0.01, momentum=0.9), dialects.pytorch(momentum=0.9)
    state = convert.from_pytorch(GIVEN, PARAMS, MAPPING, tx)
    want = convert.from_pytorch(GIVEN, PARAMS, MAPPING, plain)
    assert_same(state.inner_state, want)
    updates, _ = tx.update(GRADS, state, PARAMS)
    assert_same(updates, plain.update(GRADS, want, PARAMS)[0])
    back = convert.to_pytorch(state, PARAMS, MAPPING, tx, param_groups=[GROUP])
    for name, value in SLOTS.items():
        np.testing.assert_array_equal(back["state"][0][name], value)
    with pytest.raises(ValueError, match=r"param_groups\[0\] has {'momentum': True}, but tx does"):
        convert.from_pytorch(GIVEN, PARAMS, MAPPING, INJECTED(lr=0.01))
    given = {"state": {0: {"step": 5, "square_avg": [4.0, 9.0]}}}
    given["param_groups"] = [GROUP | {"momentum": 0}]
    hidden = optax.inject_hyperparams(dialects.pytorch)(lr=0.01)  # its 0 is an array now
    for strict in (True, False):
        with pytest.raises(ValueError, match="leaves momentum alone if static_args names it"):
            convert.from_pytorch(given, PARAMS, MAPPING, hidden, strict=strict)
    assert describe(tx).startswith("s <- decay s + (1 - decay) g^2")


def test_storage_changes():
    tx, small = (
        INJECTED(lr=0.01, momentum=0.9, storage=storage)
        for storage in (None, low_memory.bfloat16())
    )
    state = convert.from_pytorch(GIVEN, PARAMS, MAPPING, tx)
    changed = convert.change_storage(state, PARAMS, small)
    assert changed.inner_state.nu["w"].dtype == jnp.bfloat16
    assert_same(convert.change_storage(changed, PARAMS, tx), state)


def test_buffers_gain_and_lose_the_learning_rate_that_the_state_has():
    tx = optax.inject_hyperparams(rmsprop, static_args="momentum")(0.5, momentum=0.9)
    state = convert.from_pytorch(GIVEN, PARAMS, MAPPING, tx, strict=False)
    np.testing.assert_array_equal(state.inner_state.trace["w"], [0.5, -1.0])
    state.hyperparams["learning_rate"] = jnp.asarray(0.25)
    back = convert.to_pytorch(state, PARAMS, MAPPING, tx, param_groups=[GROUP], strict=False)
    np.testing.assert_array_equal(back["state"][0]["momentum_buffer"], [2.0, -4.0])
    halves = optax.MultiSteps(tx, 2)
    state = convert.from_pytorch(GIVEN, PARAMS, MAPPING, halves, strict=False)
    np.testing.assert_array_equal(state.inner_opt_state.inner_state.trace["w"], [0.5, -1.0])
    later = optax.conditionally_transform(tx, lambda step: step > 3)
    with pytest.raises(ValueError, match="its next step ignores them"):
        convert.from_pytorch(GIVEN, PARAMS, MAPPING, later, strict=False)


def test_schedules_go_on():
    """Where they would be in an uninterrupted run, in whatever inject_hyperparams counts itself."""

    def rate(count):
        return 0.1 / (1 + count)

    plain = rmsprop(rate, momentum=0.9, eps_in_sqrt=False)
    tx = optax.inject_hyperparams(rmsprop, static_args="momentum")(
        rate, momentum=0.9, eps_in_sqrt=False
    )
    for wrapped in (tx, optax.MultiSteps(tx, 1), optax.inject_hyperparams(lambda: tx)()):
        state = convert.from_pytorch(GIVEN, PARAMS, MAPPING, wrapped)
        updates, _ = wrapped.update(GRADS, state, PARAMS)
        want, _ = plain.update(GRADS, convert.from_pytorch(GIVEN, PARAMS, MAPPING, plain))
        np.testing.assert_allclose(updates["w"], want["w"], rtol=1e-6)


def test_numbers_may_be_parameters():
    tx = optax.inject_hyperparams(rmsprop, static_args="momentum")(0.5, momentum=0.9)
    slots = {"step": 5, "square_avg": 4.0, "momentum_buffer": 1.0}
    given = {"state": {0: slots}, "param_groups": [GROUP]}
    state = convert.from_pytorch(given, {"w": 1.0}, MAPPING, tx, strict=False)
    assert state.inner_state.trace["w"] == 0.5


def test_the_decay_of_optax_is_in_the_state():
    theirs = optax.rmsprop(0.1, decay=0.75, bias_correction=True)
    _, opt_state = theirs.update(GRADS, theirs.init(PARAMS))
    tx = optax.inject_hyperparams(rmsprop)(0.1, decay=0.75, bias_correction=True)
    state = convert.from_optax(opt_state, PARAMS, tx)
    assert state.inner_state.weight_sum == 0.25

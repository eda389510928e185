"""8 bits at the edges: very large or small values, NaN hyperparameters, and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._storage import slots_of

Q8 = low_memory.q8(min_size=0)


@pytest.mark.parametrize("start", [1e37, 9e37, 1.2e38, 3e38])
def test_a_large_start_value_is_forgotten(start):
    """The scale stays finite, up to the largest float32."""
    g = jnp.ones(8)
    tx = rmsprop(0.1, 0.9, 1e-8, start, storage=Q8)

    def step(state, _):
        updates, state = tx.update(g, state)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(g), None, length=2000)
    assert np.all(np.isfinite(state.nu.scales))
    np.testing.assert_allclose(updates[-1], -0.1, rtol=0.5)


@pytest.mark.parametrize("storage", [Q8, low_memory.bfloat16()], ids=str)
def test_what_is_stored_has_no_derivative(storage):
    g = jnp.ones(8)

    def state(decay, rate):
        tx = rmsprop(rate, decay, momentum=0.9, storage=storage)
        _, state = tx.update(g, tx.init(g))
        _, state = tx.update(g, state)
        return [state.nu, state.trace]

    for argnum in (0, 1):
        by = jax.jacfwd(state, argnum)(0.9, 0.1)
        for tangent in jax.tree.leaves(by):
            if tangent.dtype != jax.dtypes.float0:
                np.testing.assert_array_equal(tangent, 0)


def test_derivatives_by_a_decay_of_0_are_numbers():
    """Over two steps or more, in reverse: 0 / 0 in a branch that is not taken."""
    g = jnp.ones(8)

    def loss(decay):
        tx = rmsprop(0.1, decay, storage=Q8)
        state = tx.init(g)
        for _ in range(3):
            updates, state = tx.update(g, state)
        return jnp.sum(updates)

    assert np.isfinite(jax.grad(loss)(0.0))


def test_a_learning_rate_of_nan_leaves_no_trace():
    """Not in the first scale of momentum either, which is made of it."""
    g = jnp.ones(8)
    tx = rmsprop(lambda count: count * jnp.nan, momentum=0.9, storage=Q8)
    _, state = jax.jit(tx.update)(g, tx.init(g))
    assert np.all(np.isfinite(state.trace.scales))
    assert np.all(np.isfinite(slots_of(state.trace).decode()))


def test_a_first_gradient_beside_far_larger_ones_is_not_stored_as_0():
    """Where its square, divided by the scale, is no float32 number: 2^-126 and less."""
    g = np.float32([1e16, 0])
    tx = rmsprop(0.1, storage=Q8)
    state = tx.init(g)
    for g in ([1e16, 0], [1e16, 0], [1e16, 1e-4]):
        _, state = tx.update(np.float32(g), state)
    assert np.all(state.nu.codes > 0)

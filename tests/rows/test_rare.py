"""What the guide says about rows that are rarely touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import rmsprop, rows

RATE, EVERY, TOUCHES = 0.01, 100, 5


def ways(lazy=False, touches=TOUCHES, **kwargs):
    """Of each 100 steps: how far row 0 goes, touched in every step, and row 1, in the first."""
    tx = rmsprop(RATE, **kwargs)
    table = jnp.zeros((2, 1))

    def step(carry, i):
        table, state = carry
        indices = jnp.stack([0, jnp.where(i % EVERY == 0, 1, 2)])
        table, state = rows.update(tx, indices, jnp.ones((2, 1)), table, state)
        whole = table if lazy else rows.settle(tx, table, state)[0]
        return (table, state), whole[:, 0]

    start = table, rows.init(tx, table, lazy=lazy)
    _, path = jax.lax.scan(step, start, jnp.arange(touches * EVERY))
    return -np.asarray(path)


def test_a_rare_row_makes_long_steps():
    """.0316 a touch for .01 a step; over 100 steps .0316 for 1, 30 times less."""
    frequent, rare = np.diff(ways(), axis=0)[-EVERY:].T
    np.testing.assert_allclose(frequent, RATE, rtol=1e-4)
    np.testing.assert_allclose(rare[0], RATE / 0.1**0.5, rtol=1e-4)
    np.testing.assert_array_equal(rare[1:], 0)
    assert frequent.sum() / rare.sum() == pytest.approx(0.1**0.5 * EVERY, rel=1e-3)


def test_a_longer_memory_makes_them_longer_and_eps_shorter():
    touch = {}
    for name, kwargs in {
        "decay": {"decay": 0.999, "touches": 80},
        "eps": {"eps": 1.0},
        "bias": {"bias_correction": True},
    }.items():
        touch[name] = np.diff(ways(**kwargs), axis=0)[-EVERY, 1] / RATE
    # s is that of a sum over its touches: (1 - .999) (1 + .999^100 + .999^200 + ...).
    assert touch["decay"] == pytest.approx(((1 - 0.999**EVERY) / 0.001) ** 0.5, rel=1e-3)
    assert touch["decay"] == pytest.approx(10, rel=0.03)
    assert touch["eps"] == pytest.approx(1.1**-0.5, rel=1e-3)
    assert touch["bias"] == pytest.approx(10**0.5, rel=1e-3)


def test_with_momentum_it_keeps_moving():
    """Its buffer in all is mu + mu^2 + ... = 9 steps more."""
    rare = np.diff(ways(momentum=0.9), axis=0)[-EVERY:, 1]
    assert (rare[:20] > 0).all()
    assert rare.sum() / rare[0] == pytest.approx(10, rel=1e-3)


def test_a_lazy_row_moves_by_a_learning_rate_a_touch():
    """Once s has taken in some of its own gradients: 1 - .9^5 of them here."""
    rare = np.diff(ways(lazy=True), axis=0)[-EVERY:, 1]
    np.testing.assert_allclose(rare[0], RATE / (1 - 0.9**TOUCHES) ** 0.5, rtol=1e-4)
    np.testing.assert_array_equal(rare[1:], 0)

"""bfloat16 parameters with master weights, compared with float32 parameters and NumPy."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import low_memory

pytestmark = pytest.mark.usefixtures("default_promotion")  # for optax.apply_updates

master_weights = low_memory.master_weights
BITS = (16, 24, 32)
DROPPED = {24: 256, 32: 1}  # float32 numbers that a unit of the correction counts
GIVEN = optax.identity()  # gradients are the updates
FINITE = np.arange(65536, dtype=np.uint16).view(jnp.bfloat16)
FINITE = FINITE[np.isfinite(FINITE.astype(np.float32))]


def bfloat16(x):
    return np.asarray(x, np.float32).astype(jnp.bfloat16)


def wide(x):
    return np.asarray(x).astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def stepped(tx, params, state, update):
    """The parameters, state and master weights after a step, and the update of the parameters."""
    weights = low_memory.join_weights(params, state)
    updates, state = tx.update(update, state, params)
    params = optax.apply_updates(params, updates)
    return params, state, low_memory.join_weights(params, state), weights + update, updates


@functools.partial(jax.jit, static_argnums=(0, 3))
def trained(tx, params, grads, steps):
    """Parameters and master weights after steps of the same gradient."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, steps)
    return params, low_memory.join_weights(params, state)


@pytest.mark.parametrize("bits", [24, 32])
def test_parameter_and_correction_are_a_float32_number(bits):
    """By their definition: the nearest bfloat16, and how many float32 numbers further on."""
    rng = np.random.default_rng(0)
    sizes = np.concatenate([2.0 ** rng.uniform(-125, 127, 900), [1, 0, 2.0**-125, 3e38]])
    weights = (sizes * rng.choice([-1, 1], sizes.shape)).astype(np.float32)
    tx = master_weights(GIVEN, bits)
    params, state = low_memory.split_weights(
        weights, bfloat16(weights), tx.init(jnp.asarray(bfloat16(weights)))
    )
    # Of the bfloat16 numbers around it, none is nearer.
    around = bfloat16(weights)[:, None].view(np.uint16) + np.arange(-1, 2)
    around = np.where(weights[:, None] == 0, 0, around).astype(np.uint16).view(jnp.bfloat16)
    distance = abs(wide(around) - wide(weights)[:, None])
    np.testing.assert_array_equal(abs(wide(params) - wide(weights)), distance.min(-1))
    steps = np.asarray(state.corrections, int)
    found = np.asarray(params, np.float32)
    for i in range(abs(steps).max() * DROPPED[bits]):
        towards = np.where(steps > 0, np.inf, -np.inf).astype(np.float32)
        found = np.where(i < abs(steps) * DROPPED[bits], np.nextafter(found, towards), found)
    np.testing.assert_array_equal(low_memory.join_weights(params, state), found)
    if bits == 32:
        np.testing.assert_array_equal(found, weights)
    else:
        assert np.all(abs(wide(found) - weights) <= 2.0**-16 * abs(weights))


def corrections_of(tx, params, values):
    state = tx.init(params)
    if state.corrections is None:
        return state
    low, high = np.iinfo(state.corrections.dtype).min, np.iinfo(state.corrections.dtype).max
    return state._replace(
        corrections=np.int64(low + values * (high - low)).astype(state.corrections.dtype)
    )


def assert_moves(params, state, step, tx):
    """To the float32 sum, as near as the bits and a float32 update allow."""
    bits = tx.part.bits
    params, state = jnp.asarray(params), jax.tree.map(jnp.asarray, state)
    new, state, got, want, u = (
        np.asarray(x) if hasattr(x, "shape") else x
        for x in stepped(tx, params, state, jnp.asarray(step))
    )
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(u), finite)
    with np.errstate(over="ignore", invalid="ignore"):
        place = np.spacing(abs(want)) * 2.0 ** (32 - bits) * (bits < 32)
        error = abs(wide(got) - want)
        rest = abs(wide(new) - got)
        missed = 2.0**-24 * abs(wide(u)) + 2.0**-124  # below which processors have no differences
    inside = finite & (abs(want) < 3.3895e38) & (abs(u) < 1.7e38)
    assert np.all((error <= place + missed)[inside])
    assert np.all((rest <= 2.0**-8 * abs(wide(new)))[finite & (abs(want) > 1e-37)])
    # A distance that float32 has is gone exactly.
    exact = inside & (abs(want) > 2.0**-118) & (abs(wide(params)) > 2.0**-118)
    exact &= abs(wide(params)) < 2.0**15 * abs(wide(want))
    assert np.all((error <= place * (1 - 2.0**-20))[exact])
    return exact


@pytest.mark.parametrize("bits", BITS)
def test_every_bfloat16_number_moves_to_any_other(bits):
    """Over all exponents, signs, sizes of steps, zero crossings and both ends of the range."""
    rng, tx, exact = np.random.default_rng(bits), master_weights(GIVEN, bits), 0
    for turn in range(40):
        state = corrections_of(tx, FINITE, rng.random(FINITE.shape))
        weights = np.asarray(
            low_memory.join_weights(jnp.asarray(FINITE), jax.tree.map(jnp.asarray, state))
        )
        noise = rng.standard_normal(FINITE.shape)
        with np.errstate(over="ignore"):
            step = {
                0: weights * noise * 10.0 ** rng.uniform(-8, 8, FINITE.shape),
                1: weights * (noise * 2.0 ** -rng.uniform(8, 26, FINITE.shape) - 1),  # almost to 0
                2: rng.permutation(weights) - weights,
                3: rng.integers(-9, 9, FINITE.shape) * np.spacing(weights) / 2 - weights,
            }[turn % 4].astype(np.float32)
        exact += np.sum(assert_moves(FINITE, state, step, tx))
    assert exact > 40 * 65280 / 4


SIZES = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(SIZES, SIZES, st.floats(0, 1)), min_size=1, max_size=64))
def test_any_parameter_takes_any_step(cases):
    params, step, rest = np.resize(np.float32(cases), (64, 3)).T
    params = bfloat16(np.clip(params, -3.38e38, 3.38e38))
    for bits in BITS:
        tx = master_weights(GIVEN, bits)
        assert_moves(params, corrections_of(tx, params, rest), step, tx)


def test_the_one_step_of_32_bits_that_is_not_exact():
    """From a power of two above the weight, across 0, to a number of few bits."""
    tx, params = master_weights(GIVEN, 32), jnp.ones(1, jnp.bfloat16)
    weights = np.float32([1 - 2.0**-10])
    params, state = low_memory.split_weights(weights, params, tx.init(params))
    assert params == 1
    step = np.float32([3 * 2.0**-24]) + weights
    new, _, got, want, u = stepped(tx, params, state, -step)
    assert want == -3 * 2.0**-24
    assert new == got != want
    assert abs(got - want) <= 2.0**-24 * abs(u)


@pytest.mark.parametrize("bits", BITS)
def test_a_step_over_the_whole_range_stays_finite(bits):
    """The weights are nearer to each other than the parameters, whose distance overflows."""
    tx, params = master_weights(GIVEN, bits), jnp.asarray([-3.3895314e38], jnp.bfloat16)
    params, state = low_memory.split_weights(np.float32([-3.3854394e38]), params, tx.init(params))
    new, state, got, want, u = stepped(tx, params, state, np.float32([3.4020548e38]))
    assert np.all(np.isfinite(want))
    assert np.all(np.isfinite(u))
    assert np.all(np.isfinite(new))
    assert np.all(abs(got - want) < 2.0**-8 * 3.4e38)

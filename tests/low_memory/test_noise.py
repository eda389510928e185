"""What is rounded at random has the right mean and little noise, as an ensemble of trials shows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import low_memory, rmsprop
from small_states import STORAGES, last, row, table, values


def test_a_second_moment_is_unbiased_and_its_noise_bounded(subtests):
    """The mean of all within 4 standard errors, each of 128 of 512 trials within 5, and their
    deviation within 4 of its own."""
    grads = row(2000)

    def make(decay):
        return [rmsprop(0.1, decay, storage=storage) for storage in (None, *STORAGES.values())]

    for decay in (0.5, 0.9, 0.99, 0.999):
        plain, *states = last(make, grads, table(512), decay)
        for name, most, state in zip(STORAGES, (0.35, 0.0625), states, strict=True):
            with subtests.test(storage=name, decay=decay):
                ratio = values(state.nu) / values(plain.nu)
                deviation = ratio.std(axis=0, ddof=1)
                error = deviation / math.sqrt(512)
                assert abs(ratio.mean() - 1) < 4 * np.sqrt(np.mean(error**2) / 128) + 1e-5
                assert np.all(abs(ratio.mean(axis=0) - 1) < 5 * error + 1e-5)
                assert np.all(deviation < most * (1 + 4 / math.sqrt(2 * 512)))
                if decay == 0.999:  # a bound that nothing comes near would say little
                    assert np.median(deviation) > 0.6 * most / math.sqrt(2)


def seeds_of_q8(count):
    grads = row(100)[:, 0]

    def make():
        storages = [low_memory.q8(min_size=0, seed=seed) for seed in range(count)]
        return [rmsprop(0.1, 0.99, storage=storage) for storage in (None, *storages)]

    plain, *states = last(make, grads, jnp.ones(128))
    return np.array([values(state.nu) for state in states]) / values(plain.nu)


@pytest.mark.slow
def test_over_seeds_too():
    ratio = seeds_of_q8(32)
    z = (ratio.mean(axis=0) - 1) / (ratio.std(axis=0, ddof=1) / math.sqrt(32))
    assert np.all(abs(z) < 5)  # Student's t of 31 degrees, largest of 128
    assert 0.8 < np.sqrt(np.mean(z**2)) < 1.2


def test_over_a_few_seeds():
    """The mean over seeds and columns within 4 standard errors; and no seed rounds as another."""
    ratio = seeds_of_q8(4)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(ratio.size)
    correlations = np.corrcoef(ratio)[np.triu_indices(4, 1)]
    assert np.all(abs(correlations) < 4 / math.sqrt(128))


def test_the_noise_of_an_update(subtests):
    """At most 18% in root mean square, and the mean 5.5% longer."""

    @jax.jit
    def errors(grads, decay):
        """Of updates relative to those of float32: the mean and the mean square of each step."""
        x = table(512)
        small, plain = (rmsprop(0.1, decay, storage=s) for s in (low_memory.q8(), None))

        def step(states, g):
            g = jnp.broadcast_to(g, x.shape)
            got, rounded = small.update(g, states[0])
            want, exact = plain.update(g, states[1])
            error = got / want - 1
            return (rounded, exact), (jnp.mean(error), jnp.mean(error**2))

        return jax.lax.scan(step, (small.init(x), plain.init(x)), grads)[1]

    for decay, noise, longer in ((0.9, 0.09, 0.012), (0.99, 0.15, 0.04), (0.999, 0.18, 0.055)):
        with subtests.test(decay=decay):
            mean, square = (np.mean(np.float64(a[-500:])) for a in errors(row(2000), decay))
            assert math.sqrt(square - mean**2) < noise
            assert 0 < mean < longer


def test_where_no_gradient_arrives_the_noise_of_bfloat16_grows_with_the_root_of_time(subtests):
    """Each step rounds by a relative deviation of at most 2^-8; the mean stays right."""

    @jax.jit
    def moments(decay):
        tx = rmsprop(1.0, decay, storage=low_memory.bfloat16())

        def step(state, g):
            _, state = tx.update(jnp.full(2048, g), state)
            value = state.nu.astype(jnp.float32)
            return state, (jnp.mean(value), jnp.std(value))

        return jax.lax.scan(
            step, tx.init(jnp.zeros(2048)), (jnp.arange(5001) == 0).astype(jnp.float32)
        )[1]

    for decay, longest in ((0.9, 300), (0.99, 3000), (0.999, 5000)):
        mean, deviation = map(np.float64, moments(np.float32(decay)))
        want = (1 - np.float32(decay)) * np.float64(np.float32(decay)) ** np.arange(5001)
        for k in (10, 100, longest):
            with subtests.test(decay=decay, steps=k):
                relative = deviation[k] / mean[k]
                assert 0.0018 * math.sqrt(k) < relative < 2.0**-8 * math.sqrt(k)
                assert abs(mean[k] / want[k] - 1) < 4 * relative / math.sqrt(2048)


def test_the_noise_of_momentum(subtests):
    """Of its root mean square; and its mean is right. With decay 0 each step is a sign."""

    def make(momentum):
        return [
            rmsprop(0.1, 0.0, 1e-30, momentum=momentum, storage=storage)
            for storage in (low_memory.q8(), None)
        ]

    for momentum, noise in ((0.9, 0.12), (0.99, 0.3), (0.999, 1.2)):
        with subtests.test(momentum=momentum):
            small, plain = last(make, row(1000), table(512), momentum)
            error = values(small.trace) - values(plain.trace)
            deviation = error.std(axis=0, ddof=1)
            assert np.all(abs(error.mean(axis=0)) < 4.5 * deviation / math.sqrt(512))
            size = np.sqrt(np.mean(values(plain.trace) ** 2))
            assert noise / 3 < np.sqrt(np.mean(error**2)) / size < noise


def test_momentum_at_its_limits(subtests):
    def make(momentum):
        return [
            rmsprop(0.1, 0.0, momentum=momentum, storage=storage)
            for storage in (low_memory.q8(), None)
        ]

    for momentum in (0.0, 1.0, 1.5):
        with subtests.test(momentum=momentum):
            got, want = (values(state.trace) for state in last(make, row(8), table(256), momentum))
            deviation = got.std(axis=0) / math.sqrt(256)
            assert np.all(want)
            assert np.all(abs(got.mean(axis=0) - want[0]) < 4.5 * deviation + 1e-6)


def test_the_variance_in_8_bits_beside_a_mean_in_16():
    """Where the mean is 30 times the spread; a mean in 8 bits would leave nothing of it."""
    rng = np.random.default_rng(0)
    grads = np.float32(1 + rng.standard_normal((1000, 1, 128)) / 30)

    def make():
        return [rmsprop(0.1, 0.99, centered=True, storage=s) for s in (low_memory.q8(), None)]

    state, plain = last(make, grads, table(64))
    assert state.mu.dtype == jnp.bfloat16
    ratio = values(state.nu) / values(plain.nu)
    assert np.all(ratio > 0)
    assert 0.99 < ratio.mean() < 1.1  # the noise of the mean is added to the variance
    assert ratio.std() < 0.35


def test_a_scheduled_decay(subtests):
    """Through 0 and 1 and what lies between, against float32 in the mean of 512 trials."""
    numbers = np.float32([0.9, 0.0, 0.99, 1.0, 1.0, 0.5, 0.123, 0.999, 1e-30, 0.9, 0.7, 1.0])

    def make(decays=numbers):
        decays = jnp.asarray(decays)
        return [
            rmsprop(0.1, lambda count: decays[count], storage=storage)
            for storage in (None, *STORAGES.values())
        ]

    for traced, arguments in ((False, ()), (True, (numbers,))):
        plain, *states = last(make, row(12), table(512), *arguments)
        for name, state in zip(STORAGES, states, strict=True):
            with subtests.test(storage=name, traced=traced):
                ratio = values(state.nu) / values(plain.nu)
                error = ratio.std(axis=0) / math.sqrt(512)
                assert np.all(abs(ratio.mean(axis=0) - 1) < 4.5 * error + 1e-6)
                assert np.all(abs(ratio - 1) < 0.7)

"""Stochastic rounding has the right mean and little noise, over an ensemble of trials."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import low_memory, rmsprop
from small_states import STORAGES, last, row, table, values

# Of second moments under normal gradients: in root mean square over columns.
DEVIATIONS = {
    "q8": {0.5: 0.096, 0.9: 0.160, 0.99: 0.285, 0.999: 0.307},
    "bfloat16": {0.5: 0.0031, 0.9: 0.0057, 0.99: 0.0172, 0.999: 0.0388},
}


def test_a_second_moment_is_unbiased_and_its_noise_bounded(subtests):
    """The mean of all within 4 standard errors, each of 128 of 512 trials within 5, and their
    deviation within 4 of its own of the bound, and in the mean within 5% of what was measured.

    The bound: a step that adds a share r of a number, to be rounded to multiples of a share d, has
    the variance r d at most; the decay of 1 - r leaves (1 - r)^2 of that in each later step, and
    d / 2 in all. In 8 bits that is 1/8 at most, and in 16 bits 1/256.
    """
    grads = row(2000)

    def make(decay):
        return [rmsprop(0.1, decay, storage=storage) for storage in (None, *STORAGES.values())]

    for decay in DEVIATIONS["q8"]:
        plain, *states = last(make, grads, table(512), decay)
        for name, most, state in zip(STORAGES, (8**-0.5, 256**-0.5), states, strict=True):
            with subtests.test(storage=name, decay=decay):
                ratio = values(state.nu) / values(plain.nu)
                deviation = ratio.std(axis=0, ddof=1)
                error = deviation / math.sqrt(512)
                assert abs(ratio.mean() - 1) < 4 * np.sqrt(np.mean(error**2) / 128) + 1e-5
                assert np.all(abs(ratio.mean(axis=0) - 1) < 5 * error + 1e-5)
                assert np.all(deviation < most * (1 + 4 / math.sqrt(2 * 512)))
                found = np.sqrt(np.mean(deviation**2))
                np.testing.assert_allclose(found, DEVIATIONS[name][decay], rtol=0.05)


def test_a_second_moment_under_gradients_of_one_size():
    """Where q8's noise is largest: .31 at decay .999, near its bound."""

    def make():
        return [rmsprop(0.1, 0.999, storage=storage) for storage in (None, low_memory.q8())]

    grads = np.abs(row(1)).repeat(4000, axis=0)
    plain, state = (values(state.nu) for state in last(make, grads, table(512)))
    ratio = state / plain
    deviation = ratio.std(axis=0, ddof=1)
    assert np.all(deviation < 8**-0.5 * (1 + 4 / math.sqrt(2 * 512)))
    np.testing.assert_allclose(np.sqrt(np.mean(deviation**2)), 0.31, rtol=0.03)
    assert abs(ratio.mean() - 1) < 4 * 0.31 / math.sqrt(ratio.size)


def test_in_bfloat16_the_noise_of_an_idle_average_grows(subtests):
    """Every step rounds, and none makes up for it: deviations of .06 sqrt(1 + 2t) at most.

    There t = n (1 - decay) for n steps: the average itself is e^-t of what it was. Its mean is
    right, and the deviation is .22 at decay .999 after 10,000 steps; in 8 bits nothing is rounded.
    """

    @jax.jit
    def run(grads, decay, steps):
        txs = [rmsprop(0.1, decay, storage=storage) for storage in STORAGES.values()]
        x = table(256)

        def step(states, g):
            g = jnp.broadcast_to(g, x.shape)
            return [tx.update(g, s)[1] for tx, s in zip(txs, states, strict=True)], None

        busy, _ = jax.lax.scan(step, [tx.init(x) for tx in txs], grads)
        idle = jax.lax.fori_loop(0, steps, lambda _, s: step(s, jnp.zeros((1, 128)))[0], busy)
        return [state.nu for state in (*busy, *idle)]

    for decay, t, want in (
        (0.9, 10, 0.024),
        (0.99, 1, 0.030),
        (0.99, 10, 0.082),
        (0.999, 1, 0.081),
        (0.999, 10, 0.222),
    ):
        with subtests.test(decay=decay, t=t):
            steps = round(t / (1 - decay))
            exact, busy, same, idle = map(values, run(row(2000), np.float32(decay), steps))
            fallen = np.float64(np.float32(decay)) ** steps
            np.testing.assert_allclose(same, exact * fallen, rtol=1e-5 * max(1, steps / 2000))
            ratio = idle / (busy.mean(axis=0) * fallen)
            deviation = ratio.std(axis=0, ddof=1)
            assert abs(ratio.mean() - 1) < 5 * want / math.sqrt(ratio.size)
            most = 0.06 * math.sqrt(1 + 2 * t)
            assert np.all(deviation < most * (1 + 4 / math.sqrt(2 * 256)))
            np.testing.assert_allclose(np.sqrt(np.mean(deviation**2)), want, rtol=0.06)


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
    """7% in root mean square at decay .9, 14% at .99, 15% at .999; and longer by 3/8 of the
    variance of a second moment, as the mean of its -1/2 power is."""

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

    for decay, noise, longer in (
        (0.9, 0.073, 0.008),
        (0.99, 0.140, 0.0285),
        (0.999, 0.154, 0.034),
    ):
        with subtests.test(decay=decay):
            mean, square = (np.mean(np.float64(a[-500:])) for a in errors(row(2000), decay))
            np.testing.assert_allclose(math.sqrt(square - mean**2), noise, rtol=0.03)
            np.testing.assert_allclose(mean, longer, rtol=0.06)
            second_order = 3 / 8 * DEVIATIONS["q8"][decay] ** 2
            np.testing.assert_allclose(mean, second_order, rtol=0.2)


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
    """9% of its root mean square at .9, 28% at .99, 100% at .999; in bfloat16 a sixteenth to a
    twentieth of that. Its mean is right. With decay 0 each step is a sign."""

    def make(momentum):
        return [
            rmsprop(0.1, 0.0, 1e-30, momentum=momentum, storage=storage)
            for storage in (None, *STORAGES.values())
        ]

    for momentum, *noises in ((0.9, 0.085, 0.0055), (0.99, 0.275, 0.0175), (0.999, 1.03, 0.0515)):
        plain, *states = last(make, row(3000), table(256), momentum)
        want = values(plain.trace)
        for name, state, noise in zip(STORAGES, states, noises, strict=True):
            with subtests.test(storage=name, momentum=momentum):
                error = values(state.trace) - want
                deviation = error.std(axis=0, ddof=1)
                assert np.all(abs(error.mean(axis=0)) < 4.5 * deviation / math.sqrt(256))
                size = np.sqrt(np.mean(want**2))
                np.testing.assert_allclose(np.sqrt(np.mean(error**2)) / size, noise, rtol=0.1)


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

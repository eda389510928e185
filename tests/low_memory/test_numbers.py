"""What holds of each number that is kept, whatever its neighbours and however it is rounded."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._storage import slots_of
from small_states import after, fields, last, row, table, values


def test_where_no_gradient_arrives_the_average_decays_exactly(subtests):
    """In whole blocks, and beside busy neighbours; within the rounding of 2000 products."""
    grads = np.zeros((2001, 64, 128), np.float32)
    grads[0] = row(1, low=-1)[0]
    busy = np.random.default_rng(1).standard_normal((2001, 32, 32))
    grads[:, 1::2, ::4] = busy
    idle = np.ones((64, 128), bool)
    idle[1::2, ::4] = False

    def make():
        return [
            rmsprop(0.1, 0.999, momentum=momentum, storage=low_memory.q8())
            for momentum in (None, 0.999)
        ]

    states = [last(make, grads[:1], table(64)), last(make, grads, table(64))]
    for momentum, first, final in zip((False, True), *states, strict=True):
        for name, before, now in zip(("nu", "trace"), fields(first), fields(final), strict=False):
            with subtests.test(momentum=momentum, field=name):
                want = values(before) * np.float64(np.float32(0.999)) ** 2000
                assert np.all(want[idle] != 0)
                np.testing.assert_allclose(values(now)[idle], want[idle], rtol=1e-5)


def numbers(field):
    """The values of a field of one leaf in 8 bits, from the definition of its codes."""
    codes, scale = np.asarray(field.codes, np.int64), np.float64(field.scales[0])
    steps, one, power = (4, 180, -127) if field.codes.dtype == jnp.uint8 else (8, 96, -91)
    if scale > 0:
        places = abs(codes) - one
        size = scale * 2.0 ** (places // steps) * (1 + places % steps / steps)
    else:
        size = 2.0 ** (abs(codes) + power)
    return np.sign(codes) * size


def test_what_is_stored_is_a_neighbour_of_what_was_to_be(subtests):
    grads = row(30, seed=3)

    def make(decay):
        return [rmsprop(0.1, decay, momentum=m, storage=low_memory.q8()) for m in (None, 0.7)]

    def step(decay, g, states):
        both = zip(make(decay), states, strict=True)
        return [tx.update(g, state) for tx, state in both]

    update = jax.jit(step)
    for decay in (0.0, 0.3, 0.9, 1.0):
        states = last(make, grads[:-1], table(64), decay)
        g = np.broadcast_to(grads[-1], (64, 128))
        (_, new), (updates, with_momentum) = update(decay, g, states)
        gamma = np.float64(np.float32(decay))
        want = gamma * numbers(states[0].nu) + (1 - gamma) * np.float64(g) ** 2
        with subtests.test(decay=decay):
            got = numbers(new.nu)
            np.testing.assert_allclose(got, values(new.nu), rtol=1e-7)
            error = abs(got - want) / np.where(want == 0, 1, want)
            # Of a past that is forgotten nothing has a scale: then the step is an octave.
            assert np.all(error < (1 / 4 if decay > 0 else 1) + 1e-6)
            if decay < 1:
                assert error.max() > 1 / 10  # it is 8 bits
            # What moves the parameters is what is stored.
            np.testing.assert_array_equal(values(with_momentum.trace), -np.float64(updates))
            np.testing.assert_allclose(
                numbers(with_momentum.trace), values(with_momentum.trace), rtol=1e-7
            )


def test_nothing_becomes_0_and_small_numbers_the_smallest():
    """Once there is a scale: 2^-45 of the power of two below the largest number before."""
    sizes = np.float32(np.exp2(-0.4 * np.arange(127)))  # nu spans 100 octaves
    (first,), (state,) = (
        last(lambda: [rmsprop(0.1, storage=low_memory.q8(min_size=0))], grads, jnp.ones(127))
        for grads in (sizes[None], np.stack([sizes, sizes]))
    )
    want = 0.1 * np.square(sizes, dtype=np.float64)
    ratio = values(first.nu) / want
    assert np.all((ratio > 0.5) & (ratio < 2))  # powers of two, over all of the octaves
    nu, want = values(state.nu), 0.9 * values(first.nu) + want
    assert np.all(nu > 0)
    least = 1.25 * 2.0**-45 * np.float64(state.nu.scales[0])
    assert nu.min() == nu[-1]
    np.testing.assert_allclose(nu[-1], least, rtol=1e-7)
    above = want > 1.25 * least
    assert np.all(abs(nu[above] / want[above] - 1) < 1 / 4)
    assert 50 < np.sum(above) < 127


def test_one_huge_gradient_does_nothing_to_its_neighbours(subtests):
    """Its own second moment saturates: 2^18 above the largest, where float32 has 10^16."""

    def make(decay):
        return [rmsprop(1.0, decay, storage=s) for s in (low_memory.q8(min_size=0), None)]

    grads = np.ones((400, 1, 256), np.float32)
    grads[100, 0, 0] = 1e8
    for decay in (0.9, 0.99):
        with subtests.test(decay=decay):
            (got, _), (want, _) = after(make, grads, jnp.ones((1, 256)), decay)
            got, want = -np.asarray(got)[:, 0], -np.asarray(want)[:, 0]
            calm = np.r_[0:100, 101:400]
            assert np.all(abs(got[calm, 1:].mean(axis=1) / want[calm, 1] - 1) < 0.05)
            np.testing.assert_allclose(got[100, 0], want[100, 0], rtol=1e-5)  # the step is exact
            assert np.all(got[:, 0] >= 0.5 * want[:, 0])
            assert np.all(got[101:110, 0] < 0.01)
            assert got[399, 0] > (0.9 if decay == 0.9 else 3 * want[399, 0])


def test_growth_beyond_the_room_takes_a_step_for_each_18_octaves():
    """Gradients that grow 2^30-fold for good: second moments by 2^60, in four steps.

    Updates stay below their bound, and are those of float32 before and after.
    """
    sizes = np.float32([1.0] * 30 + [2.0**30] * 30)[:, None]
    grads = np.broadcast_to(sizes, (60, 256))

    def make():
        return [rmsprop(1.0, 0.9, storage=s) for s in (low_memory.q8(min_size=0), None)]

    (got, _), (want, _) = after(make, grads, jnp.ones(256))
    ratio = np.asarray(got).mean(axis=1) / np.asarray(want)[:, 0]
    assert np.all(abs(np.asarray(got)) <= 0.1**-0.5 * (1 + 1e-5))
    np.testing.assert_allclose(ratio[:31], 1, rtol=0.05)
    assert np.all(ratio[31:34] > 1.2)
    np.testing.assert_allclose(ratio[50:], 1, rtol=0.1)


def test_columns_of_all_sizes_have_the_same_noise():
    """On a prime axis, with gradients of 1e-6 to 1; in each tenth of the columns."""
    n = 1009
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((120, 8, n)) * np.logspace(-6, 0, n)
    grads = np.float32(grads)

    def make():
        storages = (low_memory.q8(min_size=0), None)
        return [rmsprop(1.0, 0.9, 1e-30, storage=storage) for storage in storages]

    (got, state), (want, _) = after(make, grads, jnp.ones((8, n)))
    assert sum(array.nbytes for array in jax.tree.leaves(state.nu)) == 8 * n + 4
    error = np.square(np.asarray(got)[60:] - np.asarray(want)[60:]).mean(axis=(0, 1))
    size = np.square(np.asarray(want)[60:]).mean(axis=(0, 1))
    for tenth in np.array_split(np.arange(n), 10):
        assert 0.04 < np.sqrt(error[tenth].mean() / size[tenth].mean()) < 0.08


def test_the_noise_does_not_depend_on_the_size_of_gradients():
    grads = np.float32(np.random.default_rng(0).standard_normal((60, 64, 64)))

    def make():
        storages = (low_memory.q8(min_size=0), None)
        return [rmsprop(1.0, 0.9, 0.0, storage=storage) for storage in storages]

    def error(size):
        (got, _), (want, _) = after(make, grads * np.float32(size), jnp.ones((64, 64)))
        difference = np.asarray(got)[30:] - np.asarray(want)[30:]
        return np.linalg.norm(difference) / np.linalg.norm(np.asarray(want)[30:])

    assert 0.05 < error(1.0) < 0.07
    for size in (1e-15, 1e-9, 1e9, 1e15):
        np.testing.assert_allclose(error(size), error(1.0), rtol=0.1)


LENGTHS = (1, 100, 131, 384)


def bounded(decay):
    storages = (low_memory.q8(min_size=0), low_memory.bfloat16())
    return [rmsprop(1.0, decay, 0.0, storage=storage) for storage in storages]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.9, 0.999]))
def test_updates_are_bounded_whatever_comes_after_however_long_a_silence(seed, decay):
    """|u| <= learning_rate / sqrt(1 - decay), within 1e-5, as in float32.

    In bfloat16 within 2^-8: the second moment may be rounded down by 2^-7.
    """
    rng = np.random.default_rng(seed)
    grads = {
        str(n): np.float32(10.0 ** rng.uniform(-18, 18, (12, n)) * (rng.random((12, n)) < 0.3))
        for n in LENGTHS
    }
    params = {str(n): jnp.ones(n) for n in LENGTHS}
    runs = after(bounded, grads, params, np.float32(decay))
    for name, (updates, state) in zip(("q8", "bfloat16"), runs, strict=True):
        nu = values(state.nu)
        assert any(np.any(value) for value in nu.values())
        for n in params:
            bound = (1 + (1e-5 if name == "q8" else 2.0**-8)) / math.sqrt(1 - decay)
            assert np.all(abs(np.asarray(updates[n])) <= bound), (name, n)
            assert np.all(np.isfinite(nu[n])), (name, n)


def test_values_from_elsewhere_become_the_nearest_or_0():
    """0 where they are not finite, or negative in a second moment."""
    theirs = np.float32([1, 0.7, -0.7, np.nan, np.inf, -np.inf, 0])
    state = rmsprop(0.1, momentum=0.9, storage=low_memory.q8(min_size=0)).init(theirs)
    for field, want in (
        (state.nu, [1, 0.75, 0, 0, 0, 0, 0]),  # to 1/8
        (state.trace, [1, 0.6875, -0.6875] + 4 * [0]),  # to 1/16
    ):
        got = slots_of(field).encode(theirs).decode()
        np.testing.assert_array_equal(got, np.float32(want))

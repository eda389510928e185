"""Properties of every stored element, whatever its neighbours and however it is rounded."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from eight_bits import TINY, assert_scale, choices, decode
from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._storage import slots_of
from rmsprop_jax.low_memory._joined import EightBits
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


def rounded(got, wanted, dtype, scale, slack):
    """How often the larger neighbour was taken, less its chances, in standard deviations of that.

    What is computed in float32 may lie beside a neighbour by so much of its size.
    """
    choice = choices(wanted, dtype, scale)
    near = slack * abs(wanted)
    assert np.all(abs(got) >= abs(choice.low) * (1 - 1e-6) - near)
    assert np.all(abs(got) <= abs(choice.high) * (1 + 1e-6) + near)
    open_ = (choice.chance > 0.01) & (choice.chance < 0.99)
    at = [np.isclose(got, side, 1e-6, 0) for side in (choice.low, choice.high)]
    assert np.all((at[0] | at[1])[open_])
    chance = choice.chance[open_]
    return np.sum(at[1][open_] - chance), np.sum(chance * (1 - chance))


def wild(steps):
    """Sizes over 17 decades, then a million times those; most are 0, and in two steps all."""
    rng = np.random.default_rng(5)
    grads = 10.0 ** rng.uniform(-15, 2, (steps, 64, 128)) * rng.choice([-1, 1], (steps, 64, 128))
    grads[rng.random(grads.shape) < 0.7] = 0
    grads[4:6] = 0
    grads[8:] *= 1e6
    return np.float32(grads)


def check_second_moment(old, new, g, decay):
    """The exact sum, and what chance there was in its rounding."""
    held, scale = decode(old.codes, old.scales[0]), new.scales[0]
    assert_scale("uint8", scale, old.scales[0], decay, held, first=0)
    exact = decay * held + np.float64(1 - np.float32(decay)) * g**2
    stays = decay * held if scale else 0
    wanted = stays + np.float64(1 - np.float32(decay)) * g**2
    return exact, rounded(decode(new.codes, scale), wanted, "uint8", scale, 3e-7)


def check_momentum(old, new, u, momentum, bound):
    """What is held, and what chance there was in its rounding."""
    held, scale = decode(old.codes, old.scales[0]), new.scales[0]
    first = np.exp2(np.floor(np.log2(bound)))
    assert_scale("int8", scale, old.scales[0], momentum, held, first)
    wanted, got = momentum * held + u, decode(new.codes, scale)
    slack = 2e-6 * abs(u) / np.maximum(abs(wanted), 1e-30) + 1e-6
    return got, rounded(got, wanted, "int8", scale, slack)


def test_each_step_of_the_state_is_that_of_the_definition(subtests):
    """In NumPy: the scale, the two numbers that each may become, and how often it does either.

    The plain update is of the exact sum; that with momentum is what is stored of it.
    """
    momenta = {"plain": None, "momentum": 0.7, "much": 0.99}

    @jax.jit
    def steps(grads, decay):
        txs = {
            name: rmsprop(0.1, decay, 0.0, momentum=momentum, storage=low_memory.q8())
            for name, momentum in momenta.items()
        }

        def step(states, g):
            both = {name: tx.update(g, states[name]) for name, tx in txs.items()}
            new = {name: state for name, (_, state) in both.items()}
            return new, {n: (states[n], new[n], -updates) for n, (updates, _) in both.items()}

        return jax.lax.scan(step, {name: tx.init(grads[0]) for name, tx in txs.items()}, grads)[1]

    calm = np.broadcast_to(row(16, seed=3), (16, 64, 128))
    growing = calm * np.exp2(np.arange(0, 48, 3, np.float32))[:, None, None]
    for kind, grads in {"calm": calm, "wild": wild(16), "growing": growing}.items():
        for decay in map(float, np.float32([0, 0.3, 0.9, 0.999])):
            chances = []
            found = jax.device_get(steps(grads, np.float32(decay)))
            bound = 0.1 / np.sqrt(np.float64(1 - np.float32(decay)))
            for (name, momentum), (t, g) in itertools.product(
                momenta.items(), enumerate(np.float64(grads))
            ):
                with subtests.test(kind=kind, decay=decay, form=name, step=t):
                    old, new, updates = jax.tree.map(lambda a, t=t: a[t], found[name])
                    exact, chance = check_second_moment(old.nu, new.nu, g, decay)
                    chances.append(chance)
                    u = 0.1 * g / np.sqrt(exact + TINY)
                    if momentum is None:
                        np.testing.assert_allclose(updates, u, rtol=2e-6)
                    else:
                        momentum = float(np.float32(momentum))
                        held, chance = check_momentum(old.trace, new.trace, u, momentum, bound)
                        chances.append(chance)
                        np.testing.assert_allclose(updates, held, rtol=1e-7)
            with subtests.test(kind=kind, decay=decay):
                excess, variance = np.sum(chances, axis=0)
                assert variance > 1e4
                assert abs(excess) < 4 * np.sqrt(variance)


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
    """Gradients that grow 2^30-fold for good: second moments by 2^57, which takes three steps.

    Until there is room, each gradient is as the first of its size, whose update has the bound of
    all updates; from then on they are those of float32 two steps before.
    """
    sizes = np.float32([1.0] * 30 + [2.0**30] * 30)[:, None]
    grads = np.broadcast_to(sizes, (60, 512))

    def make():
        return [rmsprop(1.0, 0.9, storage=s) for s in (low_memory.q8(min_size=0), None)]

    (got, _), (want, _) = after(make, grads, jnp.ones(512))
    got, want = -np.asarray(got), -np.asarray(want)[:, 0]
    assert np.all(got <= 0.1**-0.5 * (1 + 1e-5))
    np.testing.assert_allclose(got[30], want[30], rtol=1e-6)
    np.testing.assert_allclose(got[30:33], 0.1**-0.5, rtol=1e-5)
    mean = got.mean(axis=1)
    np.testing.assert_allclose(mean[:31], want[:31], rtol=0.03)
    np.testing.assert_allclose(mean[33:], want[31:58], rtol=0.03)


def test_momentum_grows_by_three_octaves_a_step(subtests):
    """After a learning rate that jumps: steps too short, until it fits; those lost stay lost.

    With decay 0 each step is the learning rate.
    """

    def make(jump):
        def rate(count):
            return jnp.where(count < 100, 0.01, 0.01 * jump)

        storages = (low_memory.q8(min_size=0), None)
        return [rmsprop(rate, 0.0, 0.0, momentum=0.9, storage=s) for s in storages]

    for jump in np.float32([8, 100, 1e4]):
        with subtests.test(jump=jump):
            (got, _), (want, _) = after(make, np.ones((160, 1024)), jnp.ones(1024), jump)
            got, want = -np.asarray(got).mean(axis=1), -np.asarray(want)[:, 0]
            np.testing.assert_allclose(got[:100], want[:100], rtol=0.03)
            fits = 0.9 * got[99:-1] + 0.01 * jump
            assert np.all(got[100:] >= np.minimum(0.98 * fits, 7.9 * got[99:-1]))
            assert np.all(got <= 1.02 * want)
            assert (got[100] < 0.9 * want[100]) == (jump > 100)
            np.testing.assert_allclose(got[150:], want[150:], rtol=0.03)


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
    """By powers of two all bits are the same; by other sizes, all but those."""
    grads = np.float32(np.random.default_rng(0).standard_normal((60, 64, 64)))

    def make():
        storages = (low_memory.q8(min_size=0), None)
        return [
            rmsprop(1.0, 0.9, 0.0, momentum=momentum, storage=storage)
            for momentum in (None, 0.9)
            for storage in storages
        ]

    def run(size):
        runs = after(make, grads * np.float32(size), jnp.ones((64, 64)))
        return runs, [
            np.linalg.norm(got[30:] - want[30:]) / np.linalg.norm(want[30:])
            for (got, _), (want, _) in zip(runs[::2], runs[1::2], strict=True)
        ]

    runs, errors = run(1.0)
    np.testing.assert_allclose(errors, [0.06, 0.105], rtol=0.05)
    for size in (2.0**-20, 2.0**40):
        scaled, _ = run(size)
        for (updates, state), (got, other) in zip(runs, scaled, strict=True):
            np.testing.assert_array_equal(got, updates)
            if isinstance(state.nu, EightBits):
                np.testing.assert_array_equal(other.nu.codes, state.nu.codes)
    for size in (1e-15, 1e-12, 1e-9, 1e9, 1e12, 1e15):
        np.testing.assert_allclose(run(size)[1], errors, rtol=0.03)


def test_a_byte_a_number_in_any_shape(subtests):
    """And the same noise of the twelfth update, 5%, in all of them."""
    shapes = [(50257,), (50257, 1), (1, 4099), (3, 50257), (7, 11, 13, 17), (4096,), (65537, 1)]
    rng = np.random.default_rng(0)
    params = {str(shape): jnp.ones(shape) for shape in shapes}
    grads = {
        name: np.float32(rng.standard_normal((12, *x.shape)) * 10.0 ** rng.uniform(-3, 0, x.shape))
        for name, x in params.items()
    }

    def make():
        return [rmsprop(1.0, 0.9, 0.0, storage=storage) for storage in (low_memory.q8(), None)]

    (got, state), (want, _) = after(make, grads, params)
    for shape in shapes:
        with subtests.test(shape=shape):
            name = str(shape)
            assert state.nu.codes[name].nbytes == math.prod(shape)
            error = np.linalg.norm(got[name][-1] - want[name][-1]) / np.linalg.norm(want[name][-1])
            assert 0.045 < error < 0.055
    assert state.nu.scales.nbytes == 4 * len(shapes)


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

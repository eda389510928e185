"""State in 8 and 16 bits: what is guaranteed, against float32 and against arithmetic in NumPy."""

import functools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import describe, dialects, low_memory, recipes, rmsprop, scale_by_rms
from rmsprop_jax._storage import is_packed, split
from rmsprop_jax.low_memory._blocks import block_of
from rmsprop_jax.low_memory._random import random_bits

BOTH = [low_memory.q8, low_memory.bfloat16]
FORMS = [
    {},
    {"eps_in_sqrt": False, "weight_decay": 0.1},
    {"centered": True, "momentum": 0.9},
    {"bias_correction": True, "momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "cautious": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
]


def values(field):
    """The numbers of a field of one leaf, in float64."""
    slot = split(field)
    return np.asarray(slot.decode() if is_packed(slot) else slot, np.float64)


def slots(state):
    """The fields in use of a state of one leaf."""
    return [field for field in (state.nu, state.mu, state.trace) if field is not None]


def after(tx, grads, x=None):
    """The updates of every step and the last state."""
    x = jnp.ones(grads.shape[1:]) if x is None else x

    @jax.jit
    def run(grads, state):
        def step(state, g):
            updates, state = tx.update(g, state, x)
            return state, updates

        return jax.lax.scan(step, state, grads)[::-1]

    return run(grads, tx.init(x))


def same_in_rows(steps, columns=128, rows=512, low=-3, seed=0):
    """Gradients alike in all rows, so that the rows are so many trials of the rounding."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(low, 0, columns)
    one = rng.standard_normal((steps, 1, columns)) * sizes
    return jnp.asarray(np.broadcast_to(one, (steps, rows, columns)), jnp.float32)


# What an ensemble says


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize(
    ("storage", "most"), [(low_memory.q8(), 0.25), (low_memory.bfloat16(), 0.0625)], ids=repr
)
def test_a_second_moment_is_unbiased_and_its_noise_bounded(storage, most, decay):
    """The mean of all within 4 standard errors, each of 128 of 512 trials within 5, and their
    deviation within 4 of its own."""
    grads = same_in_rows(2000 if decay == 0.999 else 400)
    _, state = after(rmsprop(0.1, decay, storage=storage), grads)
    _, plain = after(rmsprop(0.1, decay), grads[:, :1])
    ratio = values(state.nu) / values(plain.nu)
    deviation = ratio.std(axis=0, ddof=1)
    error = deviation / math.sqrt(512)
    assert abs(ratio.mean() - 1) < 4 * np.sqrt(np.mean(error**2) / 128) + 1e-5
    assert np.all(abs(ratio.mean(axis=0) - 1) < 5 * error + 1e-5)
    assert np.all(deviation < most * (1 + 4 / math.sqrt(2 * 512)))
    if decay == 0.999:  # a bound that nothing comes near would say little
        assert np.median(deviation) > 0.6 * most / math.sqrt(2)


def test_over_seeds_too():
    grads = same_in_rows(100, rows=1)[:, 0]
    plain = values(after(rmsprop(0.1, 0.99), grads)[1].nu)
    trials = [
        values(after(rmsprop(0.1, 0.99, storage=low_memory.q8(min_size=0, seed=seed)), grads)[1].nu)
        for seed in range(32)
    ]
    z = (np.mean(trials, axis=0) - plain) / (np.std(trials, axis=0, ddof=1) / math.sqrt(32))
    assert np.all(abs(z) < 5)  # Student's t of 31 degrees, largest of 128
    assert 0.8 < np.sqrt(np.mean(z**2)) < 1.2


@pytest.mark.parametrize(("decay", "noise", "longer"), [(0.9, 0.05, 0.005), (0.999, 0.11, 0.02)])
def test_the_noise_of_an_update(decay, noise, longer):
    """Some 10% at most in root mean square, and the mean 2% longer at most."""
    grads = same_in_rows(2000)
    updates, _ = after(rmsprop(0.1, decay, storage=low_memory.q8()), grads)
    plain, _ = after(rmsprop(0.1, decay), grads[:, :1])
    ratio = np.asarray(updates[-500:]) / np.asarray(plain[-500:])
    assert ratio.std() < noise
    assert 0 < ratio.mean() - 1 < longer


@pytest.mark.parametrize(("momentum", "noise"), [(0.9, 0.12), (0.99, 0.3), (0.999, 1.2)])
def test_the_noise_of_momentum(momentum, noise):
    """Of its root mean square; and its mean is right. With decay 0 each step is a sign."""
    grads = same_in_rows(1000)
    tx = functools.partial(rmsprop, 0.1, 0.0, 1e-30, momentum=momentum)
    _, state = after(tx(storage=low_memory.q8()), grads)
    _, plain = after(tx(), grads[:, :1])
    error = values(state.trace) - values(plain.trace)
    deviation = error.std(axis=0, ddof=1)
    assert np.all(abs(error.mean(axis=0)) < 4.5 * deviation / math.sqrt(512))
    size = np.sqrt(np.mean(values(plain.trace) ** 2))
    assert noise / 3 < np.sqrt(np.mean(error**2)) / size < noise


def test_the_variance_in_8_bits_beside_a_mean_in_16():
    """Where the mean is 30 times the spread; a mean in 8 bits would leave nothing of it."""
    rng = np.random.default_rng(0)
    one = 1 + rng.standard_normal((1000, 1, 128)) / 30
    grads = jnp.asarray(np.broadcast_to(one, (1000, 64, 128)), jnp.float32)
    _, state = after(rmsprop(0.1, 0.99, centered=True, storage=low_memory.q8()), grads)
    _, plain = after(rmsprop(0.1, 0.99, centered=True), grads[:, :1])
    assert state.mu.dtype == jnp.bfloat16
    ratio = values(state.nu) / values(plain.nu)
    assert np.all(ratio > 0)
    assert 0.99 < ratio.mean() < 1.1  # the noise of the mean is added to the variance
    assert ratio.std() < 0.25


# What holds of each number


@pytest.mark.parametrize("momentum", [None, 0.999])
def test_where_no_gradient_arrives_the_average_decays_exactly(momentum):
    """In whole blocks, and beside busy neighbours; within the rounding of 2000 products."""
    grads = jnp.zeros((2001, 64, 128)).at[0].set(same_in_rows(1, rows=64, low=-1)[0])
    busy = jnp.asarray(np.random.default_rng(1).standard_normal((2001, 64, 128)), jnp.float32)
    grads = grads.at[:, 1::2, ::4].set(busy[:, 1::2, ::4])
    tx = rmsprop(0.1, 0.999, momentum=momentum, storage=low_memory.q8())
    _, first = after(tx, grads[:1])
    _, last = after(tx, grads)
    idle = np.ones((64, 128), bool)
    idle[1::2, ::4] = False
    for before, now in ((first.nu, last.nu), (first.trace, last.trace)):
        if before is not None:
            want = values(before) * np.float64(np.float32(0.999)) ** 2000
            np.testing.assert_allclose(values(now)[idle], want[idle], rtol=1e-5)


def numbers(slot):
    """The values of an 8-bit slot, from the definition of its code."""
    shape = np.shape(slot.codes)
    codes = np.asarray(slot.codes, np.int64).reshape(*slot.exponents.shape, -1)
    octaves = 31 if slot.codes.dtype == jnp.uint8 else 15
    count = abs(codes) + 8 * (np.asarray(slot.exponents, np.int64)[..., None] - octaves)
    size = np.float64(slot.scales[0]) * 2.0 ** (count // 8 - 127) * (1 + count % 8 / 8)
    return (np.sign(codes) * size).reshape(shape)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
def test_what_is_stored_is_a_neighbour_of_what_was_to_be(decay):
    grads = same_in_rows(30, rows=64, seed=3)
    tx = rmsprop(0.1, decay, momentum=0.7, storage=low_memory.q8())
    _, state = after(tx, grads[:-1])
    updates, new = tx.update(grads[-1], state)
    g = np.asarray(grads[-1], np.float64)
    nu = decay * numbers(state.nu) + (1 - np.float32(decay)) * g**2
    for slot, want in ((new.nu, nu), (new.trace, -np.asarray(updates, np.float64))):
        got = numbers(slot)
        np.testing.assert_allclose(got, values(slot), rtol=1e-7)
        in_range = abs(want) > 2.0**-13 * abs(want).max(axis=-1, keepdims=True)
        error = abs(got - want) / np.where(want == 0, 1, abs(want))
        assert np.all(error[in_range] < 1 / 8)
    if decay < 1:
        assert error[in_range].max() > 1 / 20  # it is 8 bits


def test_nothing_becomes_0_and_small_numbers_the_smallest_of_their_block():
    sizes = jnp.exp2(-0.4 * jnp.arange(127.0))  # one block, nu spans 100 octaves
    _, state = after(rmsprop(0.1, storage=low_memory.q8(min_size=0)), sizes[None])
    nu, want = values(state.nu), 0.1 * np.square(sizes, dtype=np.float64)
    assert np.all(nu > 0)
    assert np.all(nu >= want * (1 - 1 / 8))
    assert np.all(nu[want > 2.0**-30 * want[0]] < want[want > 2.0**-30 * want[0]] * (1 + 1 / 8))
    assert nu.min() >= 2.0**-32 * nu.max()
    assert nu.min() == nu[-1] < 2.0**-30 * nu.max()


@pytest.mark.parametrize(("decay", "factor", "steps"), [(0.9, 682, 125), (0.99, 215, 1300)])
def test_what_one_huge_gradient_does_to_its_block(decay, factor, steps):
    """The smallest number of the block is 2^-31 of the largest, until that has decayed."""
    grads = jnp.ones((3 * steps, 1, 256)).at[100, 0, 0].set(1e8)
    tx = rmsprop(1.0, decay, storage=low_memory.q8(min_size=0))
    updates = -np.asarray(after(tx, grads)[0])[:, 0]
    assert 0.4 < updates[101, 1] * factor < 2.5  # a factor of 2: where in its octave it lies
    assert updates[100 + 2 * steps, 1] > 0.75
    assert updates[101:200, 128:].mean() > 0.95  # the next block


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    st.sampled_from(BOTH),
    st.integers(1, 400),
)
def test_updates_are_bounded_whatever_comes_after_however_long_a_silence(seed, decay, make, n):
    """|u| <= learning_rate / sqrt(1 - decay), within 1e-5, as in float32."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-18, 18, (12, n)) * (rng.random((12, n)) < 0.3)
    storage = make() if make is low_memory.bfloat16 else make(min_size=0)
    updates, state = after(rmsprop(1.0, decay, 0.0, storage=storage), jnp.float32(sizes))
    assert np.all(abs(np.asarray(updates)) <= (1 + 1e-5) / math.sqrt(1 - decay))
    assert np.all(np.isfinite(values(state.nu)))


# What is not finite


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_not_finite_stays_in_its_coordinate_and_out_of_the_state(make, form):
    if form.get("cautious"):
        form = form | {"cautious": False}  # its share is of the whole leaf
    grads = same_in_rows(4, rows=64)
    tx = rmsprop(0.1, **form, storage=make())
    step = jax.jit(tx.update)
    x = jnp.zeros((64, 128))
    state = tx.init(x)
    for g in grads[:-1]:
        _, state = step(g, state, x)
    bad = jnp.zeros((64, 128), bool).at[:, 5].set(True).at[3, ::2].set(True)
    calm, zeros = step(jnp.where(bad, 0, grads[-1]), state, x)
    _, wanted = step(jnp.where(bad, jnp.nan, grads[-1]), state, x)
    assert all(np.all(np.isfinite(values(slot))) for slot in slots(wanted))
    for slot, like in zip(slots(wanted), slots(zeros), strict=True):
        np.testing.assert_array_equal(values(slot)[~bad], values(like)[~bad])
        if not form.get("centered"):  # there a gradient of 0 is away from the mean
            np.testing.assert_array_equal(values(slot), values(like))
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        updates, got = step(jnp.where(bad, value, grads[-1]), state, x)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
        np.testing.assert_array_equal(updates[~bad], calm[~bad])
        assert np.all(np.isnan(updates[bad]) if np.isnan(value) else np.isfinite(updates[bad]))


def test_leaves_in_float32_keep_it_out_as_well():
    tx = rmsprop(0.1, momentum=0.9, storage=low_memory.q8())
    g = jnp.asarray([1.0, jnp.nan, jnp.inf])
    updates, state = tx.update(g, tx.init(jnp.zeros(3)))
    np.testing.assert_allclose(values(state.nu), [0.1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(updates, [-0.1 / 0.1**0.5, np.nan, -0.1 / 0.1**0.5], rtol=1e-5)
    np.testing.assert_allclose(values(state.trace), [0.1 / 0.1**0.5, 0, 0], rtol=1e-5)


# Decays at their limits


@pytest.mark.parametrize("make", BOTH)
def test_decay_0_and_the_first_step_of_bias_correction_forget_all(make):
    """Bit for bit the update of float32, in which the state then does not matter."""
    grads = same_in_rows(3, rows=64)
    got, state = after(rmsprop(0.1, 0.0, storage=make()), grads)
    np.testing.assert_array_equal(got, after(rmsprop(0.1, 0.0), grads)[0])
    np.testing.assert_allclose(values(state.nu), np.square(grads[-1]), rtol=1 / 8)

    got, _ = after(rmsprop(0.1, 0.9, bias_correction=True, storage=make()), grads)
    want, _ = after(rmsprop(0.1, 0.9, bias_correction=True), grads)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got, want, rtol=0.13 / 2 * 3)


@pytest.mark.parametrize("start", [0.0, 1.0, 0.3, 1e-30, 1e30])
def test_decay_1_keeps_the_start_value_for_ever_and_8_bits_hold_it_exactly(start):
    grads = same_in_rows(20, rows=64)
    got, state = after(rmsprop(0.1, 1.0, 1e-8, start, storage=low_memory.q8()), grads)
    want, plain = after(rmsprop(0.1, 1.0, 1e-8, start), grads)
    np.testing.assert_array_equal(values(state.nu), values(plain.nu))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("traced", [False, True])
def test_a_scheduled_decay(make, traced):
    """Through 0 and 1 and what lies between, against float32 in the mean of 512 trials."""
    decays = jnp.asarray([0.9, 0.0, 0.99, 1.0, 1.0, 0.5, 0.123, 0.999, 1e-30, 0.9, 0.7, 1.0])
    grads = same_in_rows(len(decays))

    def run(storage, decays):
        return after(rmsprop(0.1, lambda count: decays[count], storage=storage), grads)[1].nu

    run = jax.jit(run, static_argnums=0) if traced else run
    ratio = values(run(make(), decays)) / values(run(None, decays))
    assert np.all(abs(ratio.mean(axis=0) - 1) < 4.5 * ratio.std(axis=0) / math.sqrt(512) + 1e-6)
    assert np.all(abs(ratio - 1) < 0.7)


@pytest.mark.parametrize("momentum", [0.0, 1.0, 1.5])
def test_momentum_at_its_limits(momentum):
    grads = same_in_rows(8, rows=256)
    tx = functools.partial(rmsprop, 0.1, 0.0, momentum=momentum)
    got = values(after(tx(storage=low_memory.q8()), grads)[1].trace)
    want = values(after(tx(), grads[:, :1])[1].trace)
    deviation = got.std(axis=0) / math.sqrt(256)
    assert np.all(abs(got.mean(axis=0) - want) < 4.5 * deviation + 1e-6)


def test_schedules_arrays_and_numbers_give_the_same_bits():
    grads = same_in_rows(5, rows=64)
    runs = [
        after(rmsprop(0.1, decay, momentum=0.9, storage=low_memory.q8()), grads)
        for decay in (0.9, jnp.float32(0.9), lambda count: 0.9)
    ]
    for run in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, run, runs[0])


@pytest.mark.parametrize("make", BOTH)
def test_an_update_has_the_derivatives_of_float32(make):
    """By learning rate, decay and gradient, where nothing is stored yet."""

    def update(learning_rate, decay, g, storage):
        tx = rmsprop(learning_rate, decay, 1e-3, momentum=0.9, storage=storage)
        return jnp.sum(jnp.sin(tx.update(g, tx.init(g))[0]))

    g = same_in_rows(1, rows=64)[0]
    by = jax.grad(update, argnums=(0, 1, 2))
    for got, want in zip(by(0.1, 0.9, g, make()), by(0.1, 0.9, g, None), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


# Bits


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_bits_eagerly_compiled_and_in_a_loop(make, form):
    """Of the state; updates may be rounded in another order in another program."""
    params = {"a": jnp.ones((33, 256)), "b": {"c": jnp.ones((4096,)), "d": jnp.ones(())}}
    rng = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal((6, *p.shape)), jnp.float32), params
    )
    tx = rmsprop(0.1, **form, storage=make(seed=7))

    def loop(update):
        state = tx.init(params)
        for t in range(6):
            _, state = update(jax.tree.map(lambda g, t=t: g[t], grads), state, params)
        return state

    want = loop(tx.update)
    scanned = jax.lax.scan(lambda s, g: (tx.update(g, s, params)[1], None), tx.init(params), grads)
    for got in (loop(jax.jit(tx.update)), scanned[0]):
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_seed_leaf_step_and_slot_change_the_bits():
    g = jnp.full((64, 128), 0.7)
    params = {"a": g, "b": g}

    def codes(seed, steps=1, leaf="a", momentum=None):
        tx = rmsprop(0.1, 0.9, momentum=momentum, storage=low_memory.q8(seed=seed))
        state = tx.init(params)
        for _ in range(steps):
            _, state = tx.update(params, state)
        return np.asarray(state.nu.codes[leaf])

    one = codes(0)
    assert 0.1 < np.mean(one == one.max()) < 0.99
    np.testing.assert_array_equal(one, codes(0))
    for other in (codes(1), codes(-1), codes(2**40), codes(0, leaf="b")):
        agree = np.mean((one == one.max()) == (other == one.max()))
        share = np.mean(one == one.max())
        np.testing.assert_allclose(agree, share**2 + (1 - share) ** 2, atol=4 * 0.5 / 8192**0.5)


def words(key, n, bits=20):
    return np.asarray(random_bits(jnp.uint32(key), (n,), bits)).astype(np.int64)


@pytest.mark.parametrize("key", [0, 1, 0xDEADBEEF, 2**32 - 1])
def test_the_hash_is_uniform_over_places(key):
    """chi^2 within 5 of its standard deviations, for the upper, middle and lower bits."""
    n = 1 << 18
    x = words(key, n)
    for shift in (12, 6, 0):
        counts = np.bincount(x >> shift & 255, minlength=256)
        chi2 = np.sum((counts - n / 256) ** 2) / (n / 256)
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def correlation(x, y):
    return abs(np.corrcoef(x, y)[0, 1]) * math.sqrt(len(x))


def test_the_hash_does_not_correlate_over_places_steps_or_keys():
    """Within 5 standard errors, for the numbers and for each pair of their upper four bits."""
    n = 1 << 16
    x = words(12345, n + 4096)
    pairs = [(x[:n], x[lag : lag + n]) for lag in (1, 2, 3, 7, 64, 128, 1000, 1024, 4096)]
    pairs += [(x[:n], words(12345 ^ 1 << bit, n)) for bit in range(32)]
    for a, b in pairs:
        assert correlation(a, b) < 5
        for i in range(16, 20):
            for j in range(16, 20):
                assert correlation(a >> i & 1, b >> j & 1) < 5


def test_the_hash_over_steps_is_uniform_in_one_place():
    """The sequence that one number sees: its mean, spread and correlation from step to step."""
    tx = rmsprop(0.1, 0.5, storage=low_memory.q8(min_size=0))
    g = jnp.full((1000, 8), jnp.sqrt(jnp.float32(1.0 + 1 / 16)))

    empty = tx.init(g[0]).nu

    def step(state, g):
        # Half way between neighbours, and forgotten at each step: up or down at random.
        _, state = tx.update(g * jnp.sqrt(2.0), state._replace(nu=empty))
        return state, state.nu.codes

    _, codes = jax.lax.scan(step, tx.init(g[0]), g)
    up = np.asarray(codes, np.int64) - int(codes.min())
    assert set(np.unique(up)) == {0, 1}
    assert np.all(abs(up.mean(axis=0) - 0.5) < 5 * 0.5 / math.sqrt(1000))
    for place in up.T:
        assert correlation(place[1:], place[:-1]) < 5


# Forms and sizes


@pytest.mark.parametrize(
    ("n", "block", "length"),
    [
        (1024, 128, 128),
        (768, 128, 96),
        (512, 128, 64),
        (384, 128, 96),
        (300, 128, 75),
        (128, 128, 64),
        (10, 128, 10),
        (1, 128, 1),
        (127, 128, 127),
        (131, 128, 131),
        (1_000_003, 128, 1_000_003),
        (262, 128, 131),
        (3721, 128, 3721),
        (1024, 256, 128),
        (1024, 1, 1),
        (1024, 10**9, 1024),
        (7, 3, 7),
    ],
)
def test_the_length_of_blocks(n, block, length):
    assert block_of(n, block) == length


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=2),
    st.one_of(st.integers(1, 700), st.sampled_from([1, 2, 127, 131, 251, 997, 1024, 4099])),
    st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32]),
    st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32]),
    st.sampled_from(FORMS),
    st.sampled_from([1, 3, 16, 128]),
)
def test_any_shape(lead, n, dtype, grad_dtype, form, block):
    """Two steps stay near float32, structure and types stay what they were."""
    shape = (*lead, n)
    x = jnp.ones(shape, dtype)
    g = jnp.asarray(np.random.default_rng(n).uniform(0.5, 2, shape), grad_dtype)
    tx, plain = (
        rmsprop(0.1, eps=1e-2, **form, storage=storage)
        for storage in (low_memory.q8(block=block, min_size=0), None)
    )
    state, wanted = tx.init(x), plain.init(x)
    for _ in range(2):
        updates, new = tx.update(g, state, x)
        want, wanted = plain.update(g, wanted, x)
        assert updates.dtype == grad_dtype
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        state = new
    assert state.nu.codes.shape == shape
    assert state.nu.exponents.shape == (*lead, n // block_of(n, block))
    np.testing.assert_allclose(np.float32(updates), np.float32(want), rtol=0.2, atol=0.02)


def test_small_leaves_and_one_of_one_long_block():
    """Each with its own scale and bits, as if it were alone."""
    rng = np.random.default_rng(0)
    shapes = {f"leaf{i}": (i % 3 + 1, 3 * (i % 4) + 1) for i in range(8)} | {"long": (10007,)}
    grads = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
    tx = rmsprop(0.1, momentum=0.9, storage=low_memory.q8(min_size=0))
    update = jax.jit(tx.update)
    state = tx.init(grads)
    alone = {name: tx.init({name: grads[name]}) for name in ("leaf2", "leaf6", "long")}
    assert state.nu.exponents["long"].shape == (1,)
    for _ in range(2):
        _, state = update(grads, state)
        alone = {name: update({name: grads[name]}, one)[1] for name, one in alone.items()}
    for name, one in alone.items():
        np.testing.assert_array_equal(split(state.nu)[name].decode(), split(one.nu)[name].decode())
        np.testing.assert_array_equal(state.trace.codes[name], one.trace.codes[name])


def test_which_leaves_are_held_in_8_bits():
    params = {
        "scalar": jnp.ones(()),
        "small": jnp.ones(4095),
        "large": jnp.ones(4096),
        "empty": jnp.ones((0, 128)),
        "complex": jnp.ones(4096, jnp.complex64),
        "embedding": {"table": jnp.ones((64, 64))},
    }
    storage = low_memory.q8(exempt=lambda path: path.startswith("embedding/"))
    state = rmsprop(0.1, centered=True, momentum=0.9, storage=storage).init(params)
    eight = {"large"}
    for name, param in params.items():
        for slot in ("nu", "mu", "trace"):
            held = jax.tree.leaves(split(getattr(state, slot))[name], is_leaf=is_packed)[0]
            assert is_packed(held) == (name in eight and slot != "mu"), (name, slot)
            if name in eight and slot == "mu":
                assert held.dtype == jnp.bfloat16
            elif name not in eight:
                wide = slot != "nu" and name == "complex"
                assert held.dtype == (jnp.complex64 if wide else jnp.float32)
        del param
    assert state.nu.codes["large"].dtype == jnp.uint8
    assert state.trace.codes["large"].dtype == jnp.int8


def test_an_exempt_leaf_has_the_bits_of_float32():
    grads = same_in_rows(5, rows=64)
    storage = low_memory.q8(exempt=lambda path: True)
    got, state = after(rmsprop(0.1, momentum=0.9, storage=storage), grads)
    want, plain = after(rmsprop(0.1, momentum=0.9), grads)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(state.nu.codes, plain.nu)
    np.testing.assert_array_equal(state.trace.codes, plain.trace)


@pytest.mark.parametrize("make", BOTH)
def test_float64_parameters_are_held_in_as_few_bits(make):
    with jax.enable_x64(True):
        x = jnp.ones((64, 128), jnp.float64)
        tx = rmsprop(0.1, momentum=0.9, storage=make())
        updates, state = tx.update(2 * x, tx.init(x))
        assert updates.dtype == jnp.float64
        np.testing.assert_allclose(updates, -0.1 * 2 / np.sqrt(0.1 * 4), rtol=1e-6)
        assert sum(a.nbytes for a in jax.tree.leaves((state.nu, state.trace))) < 4.1 * x.size


# Bytes


def compiled_step(tx, shape):
    def step(x, state, g):
        updates, state = tx.update(g, state, x)
        return optax.apply_updates(x, updates), state

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    args = x, jax.eval_shape(tx.init, x), x
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


@pytest.mark.parametrize(
    ("form", "state_bytes", "temporary"),
    [
        ({}, 1.0079, 1.1),
        ({"eps_in_sqrt": False}, 1.0079, 1.1),
        ({"bias_correction": True}, 1.0079, 1.1),
        ({"weight_decay": 0.1, "decoupled_weight_decay": True}, 1.0079, 1.1),
        ({"centered": True}, 3.0079, 3.1),
        ({"momentum": 0.9}, 2.0158, 6.1),
        ({"weight_decay": 0.1}, 1.0079, 5.1),
    ],
    ids=str,
)
def test_bytes_a_parameter(form, state_bytes, temporary):
    """Of the state, and of what a compiled step with donated buffers needs besides."""
    shape = (1024, 1024)
    tx = rmsprop(1e-3, **form, storage=low_memory.q8())
    state = jax.eval_shape(tx.init, jnp.ones(shape))
    size = math.prod(shape)
    assert sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state)) < (
        state_bytes * size
    )
    memory = compiled_step(tx, shape).memory_analysis()
    assert memory.temp_size_in_bytes < temporary * size


def test_bytes_of_bfloat16():
    shape = (1024, 1024)
    tx = rmsprop(1e-3, momentum=0.9, centered=True, storage=low_memory.bfloat16())
    state = jax.eval_shape(tx.init, jnp.ones(shape))
    assert {a.dtype for a in jax.tree.leaves((state.nu, state.mu, state.trace))} == {
        jnp.dtype(jnp.bfloat16)
    }
    plain = rmsprop(1e-3, storage=low_memory.bfloat16())
    assert compiled_step(plain, shape).memory_analysis().temp_size_in_bytes < 2.1 * 2**20


# Where a storage goes


def test_it_goes_to_every_dialect_and_recipe():
    storage = low_memory.q8(min_size=0)
    made = [getattr(dialects, name)(0.1, storage=storage) for name in dialects.__all__]
    made += [scale_by_rms(storage=storage), recipes.nature_dqn(storage=storage)]
    x = jnp.ones((4, 128))
    for tx in made:
        updates, state = tx.update(x, tx.init(x), x)
        assert np.all(np.isfinite(updates))
        assert any(array.dtype == jnp.uint8 for array in jax.tree.leaves(state))
        assert "held by q8(block=128, min_size=0, seed=0)" in describe(tx)


def test_how_a_storage_shows_itself():
    assert repr(low_memory.bfloat16()) == "bfloat16(seed=0)"
    assert repr(low_memory.q8(64, 0, 3, axis_name="data")) == (
        "q8(block=64, min_size=0, seed=3, axis_name='data')"
    )


def test_equal_storages_compile_once():
    a, b = low_memory.q8(seed=1), low_memory.q8(seed=1)
    assert (a, hash(a)) == (b, hash(b))
    assert a != low_memory.q8(seed=2)

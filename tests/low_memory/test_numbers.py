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


def numbers(slot):
    """The values of an 8-bit slot, from the definition of its code."""
    shape = np.shape(slot.codes)
    codes = np.asarray(slot.codes, np.int64).reshape(*slot.exponents.shape, -1)
    octaves = 31 if slot.codes.dtype == jnp.uint8 else 15
    count = abs(codes) + 8 * (np.asarray(slot.exponents, np.int64)[..., None] - octaves)
    size = np.float64(slot.scales[0]) * 2.0 ** (count // 8 - 127) * (1 + count % 8 / 8)
    return (np.sign(codes) * size).reshape(shape)


def test_what_is_stored_is_a_neighbour_of_what_was_to_be(subtests):
    grads = row(30, seed=3)

    def make(decay):
        return [rmsprop(0.1, decay, momentum=0.7, storage=low_memory.q8())]

    update = jax.jit(lambda decay, g, state: make(decay)[0].update(g, state))
    for decay in (0.0, 0.3, 0.9, 1.0):
        (state,) = last(make, grads[:-1], table(64), decay)
        g = np.broadcast_to(grads[-1], (64, 128))
        updates, new = update(decay, g, state)
        nu = decay * numbers(state.nu) + (1 - np.float32(decay)) * np.float64(g) ** 2
        for name, want in (("nu", nu), ("trace", -np.asarray(updates, np.float64))):
            with subtests.test(decay=decay, field=name):
                got = numbers(getattr(new, name))
                np.testing.assert_allclose(got, values(getattr(new, name)), rtol=1e-7)
                in_range = abs(want) > 2.0**-13 * abs(want).max(axis=-1, keepdims=True)
                error = abs(got - want) / np.where(want == 0, 1, abs(want))
                assert np.all(error[in_range] < 1 / 8)
                if name == "trace" or decay < 1:
                    assert error[in_range].max() > 1 / 20  # it is 8 bits


def test_nothing_becomes_0_and_small_numbers_the_smallest_of_their_block():
    sizes = np.float32(np.exp2(-0.4 * np.arange(127)))  # one block, nu spans 100 octaves
    (state,) = last(
        lambda: [rmsprop(0.1, storage=low_memory.q8(min_size=0))], sizes[None], jnp.ones(127)
    )
    nu, want = values(state.nu), 0.1 * np.square(sizes, dtype=np.float64)
    assert np.all(nu > 0)
    assert np.all(nu >= want * (1 - 1 / 8))
    above = want > 2.0**-30 * want[0]
    assert np.all(nu[above] < want[above] * (1 + 1 / 8))
    assert nu.min() >= 2.0**-32 * nu.max()
    assert nu.min() == nu[-1] < 2.0**-30 * nu.max()


def test_what_one_huge_gradient_does_to_its_block(subtests):
    """The smallest number of the block is 2^-31 of the largest, until that has decayed."""

    def make(decay):
        return [rmsprop(1.0, decay, storage=low_memory.q8(min_size=0))]

    grads = np.ones((3900, 1, 256), np.float32)
    grads[100, 0, 0] = 1e8
    for decay, factor, steps in ((0.9, 682, 125), (0.99, 215, 1300)):
        with subtests.test(decay=decay):
            ((updates, _),) = after(make, grads, jnp.ones((1, 256)), decay)
            updates = -np.asarray(updates)[:, 0]
            assert 0.4 < updates[101, 1] * factor < 2.5  # 2: where in its octave it lies
            assert updates[100 + 2 * steps, 1] > 0.75
            assert updates[101:200, 128:].mean() > 0.95  # the next block


# Of one number, of one block, of a prime number, and of several blocks.
LENGTHS = (1, 100, 131, 384)


def bounded(decay):
    storages = (low_memory.q8(min_size=0), low_memory.bfloat16())
    return [rmsprop(1.0, decay, 0.0, storage=storage) for storage in storages]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.9, 0.999]))
def test_updates_are_bounded_whatever_comes_after_however_long_a_silence(seed, decay):
    """|u| <= learning_rate / sqrt(1 - decay), within 1e-5, as in float32."""
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
            bound = (1 + 1e-5) / math.sqrt(1 - decay)
            assert np.all(abs(np.asarray(updates[n])) <= bound), (name, n)
            assert np.all(np.isfinite(nu[n])), (name, n)


def test_values_from_elsewhere_become_the_nearest_or_0():
    """0 where they are not finite, or negative in a second moment."""
    theirs = np.float32([1, 0.7, -0.7, np.nan, np.inf, -np.inf, 0])
    state = rmsprop(0.1, momentum=0.9, storage=low_memory.q8(min_size=0)).init(theirs)
    for field, want in (
        (state.nu, [1, 0.7, 0, 0, 0, 0, 0]),
        (state.trace, [1, 0.7, -0.7] + 4 * [0]),
    ):
        got = slots_of(field).encode(theirs).decode()
        np.testing.assert_allclose(got, want, rtol=1 / 16)

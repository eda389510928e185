"""Non-finite gradients, decays of 0 and 1, and derivatives: as without a storage."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from helpers import assert_moved
from rmsprop_jax import low_memory, rmsprop
from small_states import FORMS, STORAGES, after, decoded, fields, row, table, values


def test_what_is_not_finite_stays_in_its_coordinate_and_out_of_the_state(subtests):
    # With cautious, the share of the whole leaf is in each update.
    forms = [{name: v for name, v in form.items() if name != "cautious"} for form in FORMS]
    cases = {
        (name, str(form)): (form, rmsprop(0.1, **form, storage=storage))
        for name, storage in STORAGES.items()
        for form in forms
    }
    x = jnp.zeros((64, 128))

    @jax.jit
    def step(g, states):
        both = {case: tx.update(g, states[case], x) for case, (_, tx) in cases.items()}
        return tuple({case: pair[i] for case, pair in both.items()} for i in range(2))

    *grads, g = np.broadcast_to(row(4), (4, 64, 128))
    states = jax.jit(lambda: {case: tx.init(x) for case, (_, tx) in cases.items()})()
    for earlier in grads:
        _, states = step(earlier, states)
    bad = np.zeros((64, 128), bool)
    bad[:, 5] = True
    bad[3, ::2] = True
    calm, zeros = step(np.where(bad, 0, g), states)
    nan, wanted = step(np.where(bad, np.float32(np.nan), g), states)
    infinite = [step(np.where(bad, np.float32(sign * np.inf), g), states) for sign in (1, -1)]
    for case, (form, _) in cases.items():
        with subtests.test(storage=case[0], form=form):
            for kept, like in zip(fields(wanted[case]), fields(zeros[case]), strict=True):
                kept, like = values(kept), values(like)
                assert np.all(np.isfinite(kept))
                assert len(np.unique(kept)) > 8
                np.testing.assert_array_equal(kept[~bad], like[~bad])
                if not form.get("centered"):  # there a gradient of 0 is away from the mean
                    np.testing.assert_array_equal(kept, like)
            for updates, got in [(nan, wanted), *infinite]:
                *averages, trace = [values(field) for field in fields(got[case])] + [None]
                if "momentum" in form:  # an infinite gradient enters it by a step of bounded size
                    *averages, trace = values(got[case].nu), values(got[case].trace)
                    want = values(wanted[case].trace)
                    assert np.all(np.isfinite(trace))
                    np.testing.assert_array_equal(trace[~bad], want[~bad])
                for found, field in zip(averages, fields(wanted[case]), strict=False):
                    np.testing.assert_array_equal(found, values(field))
                np.testing.assert_array_equal(updates[case][~bad], calm[case][~bad])
            assert np.all(np.isnan(nan[case][bad]))
            assert all(np.all(np.isfinite(updates[case][bad])) for updates, _ in infinite)


def test_a_buffer_saturates(subtests):
    """In one direction and against it, at momenta that none of its numbers can follow."""

    def make(rate, momentum):
        return [rmsprop(rate, momentum=momentum, storage=one) for one in STORAGES.values()]

    grads = np.float32([1, 1, -1]).repeat(4)[:, None, None]
    for rate, momentum in ((0.1, 2.0), (0.1, 3e38), (3e38, 1.99), (3e38, 3e38)):
        runs = after(make, grads, table(32), *np.float32([rate, momentum]))
        for name, (updates, state) in zip(STORAGES, runs, strict=True):
            with subtests.test(storage=name, rate=rate, momentum=momentum):
                assert np.all(np.isfinite(updates))
                assert np.all(np.isfinite(values(state.trace)))
                assert np.max(abs(updates)) > 100


def test_leaves_in_float32_keep_it_out_as_well():
    tx = rmsprop(0.1, momentum=0.9, storage=low_memory.q8())
    g = jnp.asarray([1.0, jnp.nan, jnp.inf])
    updates, state = tx.update(g, tx.init(jnp.zeros(3)))
    np.testing.assert_allclose(values(state.nu), [0.1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(updates, [-0.1 / 0.1**0.5, np.nan, -0.1 / 0.1**0.5], rtol=1e-5)
    np.testing.assert_allclose(values(state.trace), [0.1 / 0.1**0.5, 0, 0.1 / 0.1**0.5], rtol=1e-5)


def test_decay_0_and_the_first_step_of_bias_correction_forget_all(subtests):
    """The update of float32, in which the state then does not matter.

    In 8 bits bit for bit; in 16 bits it is made of the second moment that is stored, to 2^-8.
    """
    grads = row(3)
    storages = [None, *STORAGES.values()]

    def make():
        return [rmsprop(0.1, 0.0, storage=storage) for storage in storages] + [
            rmsprop(0.1, 0.9, bias_correction=True, storage=storage) for storage in storages
        ]

    runs = after(make, grads, table(64))
    (want, _), *forgetful = runs[:3]
    (corrected, _), *others = runs[3:]
    for name, (got, state), (other, _) in zip(STORAGES, forgetful, others, strict=True):
        with subtests.test(storage=name):
            rtol = 0 if name == "q8" else 2.0**-8
            np.testing.assert_allclose(got, want, rtol)
            squares = np.broadcast_to(np.square(grads[-1]), (64, 128))
            # Of a past that is forgotten 8 bits have no scale: powers of two, on either side.
            ratio = values(state.nu) / squares
            assert np.all((ratio > 0.5) & (ratio < 2))
            np.testing.assert_allclose(other[0], corrected[0], rtol)
            np.testing.assert_allclose(other, corrected, rtol=0.45 if name == "q8" else 0.02)


def test_decay_1_keeps_the_start_value_for_ever_and_8_bits_hold_it_exactly(subtests):
    def make(start):
        return [
            rmsprop(0.1, 1.0, 1e-8, start, storage=storage) for storage in (low_memory.q8(), None)
        ]

    for start in (0.0, 1.0, 0.3, 2.4e-38, 1e-30, 1e30):
        with subtests.test(start=start):
            (got, state), (want, plain) = after(make, row(20), table(64), start)
            np.testing.assert_array_equal(values(plain.nu), np.float32(start))
            np.testing.assert_array_equal(values(state.nu), values(plain.nu))
            np.testing.assert_array_equal(got, want)


def test_schedules_arrays_and_numbers_give_the_same_bits():
    def make(decay):
        return [
            rmsprop(0.1, decay, momentum=0.9, storage=low_memory.q8())
            for decay in (0.875, decay, lambda count: 0.875)
        ]

    first, *others = after(make, row(5), table(64), np.float32(0.875))
    assert_moved(first)
    for run in others:
        jax.tree.map(np.testing.assert_array_equal, run, first)


def test_a_schedule_that_forgets_makes_the_step_of_float32():
    """Where a scheduled decay is 0, or the learning rate is 0 before it is not."""
    grads = row(30)

    def make(momentum):
        def decay(count):
            return jnp.where(count == 20, 0.0, 0.9)

        def rate(count):
            return jnp.where(count == 0, 0.0, 0.1)

        storages = [None, *STORAGES.values()]
        forget = [rmsprop(0.1, decay, storage=storage) for storage in storages]
        wait = [rmsprop(rate, 0.9, momentum=momentum, storage=storage) for storage in storages]
        return forget + wait

    runs = [np.asarray(updates) for updates, _ in after(make, grads, table(64), 0.9)]
    for name, got, rtol in zip(STORAGES, runs[1:3], (0, 2.0**-8), strict=True):
        np.testing.assert_allclose(got[20], runs[0][20], rtol, err_msg=name)
    plain, *others = runs[3:]
    for name, got, most in zip(STORAGES, others, (0.12, 0.008), strict=True):
        np.testing.assert_array_equal(got[0], 0, err_msg=name)
        error = (
            np.linalg.norm(got - plain, axis=(1, 2))[1:] / np.linalg.norm(plain, axis=(1, 2))[1:]
        )
        assert np.all(error < most), name
        assert error[-1] > most / 3, name


def test_zeros_stay_zeros_and_make_no_step(subtests):
    def make():
        return [rmsprop(0.1, **form, storage=s) for s in STORAGES.values() for form in FORMS[::2]]

    x = jnp.zeros((64, 128))  # at which no weight decay pulls
    for updates, state in after(make, np.zeros((3, 64, 128), np.float32), x):
        with subtests.test(type=type(state.nu).__name__):
            np.testing.assert_array_equal(updates, 0)
            for field in fields(state):
                np.testing.assert_array_equal(values(field), 0)


SIZES = (1e-16, 1e-17, 1e-18, 3e-19, 1e-19, 1e-20, 1e-30, 1e-38, 1e-45)


def test_gradients_whose_squares_are_hardly_numbers(subtests):
    """To where float32 ends: errors of 10%, and no update longer than the bound.

    Below 1e-19 the least number in the root is all there is, and the update is that of float32.
    """
    noise = np.random.default_rng(0).standard_normal((40, 4096))
    grads = {str(size): np.float32(noise * size) for size in SIZES}
    params = {str(size): jnp.ones(4096) for size in SIZES}

    def make():
        return [rmsprop(1.0, 0.9, 0.0, storage=s) for s in (low_memory.q8(), None)]

    (got, _), (want, _) = after(make, grads, params)
    for size in SIZES:
        with subtests.test(size=size):
            a, b = (np.float64(run[str(size)]) for run in (got, want))
            assert np.all(abs(a) <= 0.1**-0.5 * (1 + 1e-5))
            error = np.linalg.norm(a - b, axis=1)
            assert np.all(error <= (0.12 if size > 1e-19 else 0.03) * np.linalg.norm(b, axis=1))
            if size < 1e-19:
                np.testing.assert_allclose(a, b, rtol=1e-6)


def test_steps_far_below_their_bound_reach_momentum_unbiased(subtests):
    """Gradients far below the root of eps: the first scale of momentum is then far too large.

    What is stored of a step, at first 0 or the smallest number at random, is right in the mean; the
    scale shrinks with the largest number, and after some steps the noise is as elsewhere.
    """
    x = jnp.ones(1 << 15)

    def make():
        return [rmsprop(1.0, 0.9, 1.0, momentum=0.9, storage=s) for s in (low_memory.q8(), None)]

    for size in (1e-3, 1e-4, 1e-5):
        with subtests.test(size=size):
            grads = np.full((100, 1), size, np.float32)
            (got, _), (want, _) = after(make, grads, x)
            got, want = -np.asarray(got, np.float64), -np.asarray(want, np.float64)[:, :1]
            standard = got.std(axis=1) / math.sqrt(x.size)
            assert np.all(abs(got.mean(axis=1) - want[:, 0]) < 5 * standard)
            error = np.sqrt(np.mean((got / want - 1) ** 2, axis=1))
            assert np.all(error[80:] < 0.12)
            assert error[0] < math.sqrt(2.0**-11 * 4 / size)


def test_an_update_has_the_derivatives_of_float32(subtests):
    """By learning rate, decay and gradient; forward and in reverse.

    Where nothing is stored yet, and after three steps from the values that are: what is stored has
    no derivative. What is used as it is stored has those of what was rounded. In bfloat16 they are
    taken at the second moment that is stored, to 2^-8.
    """
    g = jnp.asarray(np.broadcast_to(row(1)[0], (64, 128)))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(g.shape), jnp.float32)

    def update(learning_rate, decay, g, tx, state):
        return jnp.sum(weights * tx(learning_rate, decay).update(g, state)[0])

    def derivatives(arguments, storage, state):
        def tx(rate, decay):
            return rmsprop(rate, decay, 1e-3, momentum=0.9, storage=storage)

        by = jax.grad(update, argnums=(0, 1, 2))(*arguments, tx, state)
        forward = jax.jacfwd(update, argnums=(0, 1))(*arguments, tx, state)
        along = jax.jvp(lambda g: update(*arguments[:2], g, tx, state), (g,), (weights,))[1]
        return (*by, *forward, along)

    @jax.jit
    def pairs(*arguments):
        """Of each storage and of float32, at the same values."""
        found = {}
        for name, storage in STORAGES.items():
            state = rmsprop(0.1, momentum=0.9, storage=storage).init(g)
            plain = rmsprop(0.1, momentum=0.9).init(g)
            for steps in (0, 3):
                for _ in range(steps):
                    _, state = rmsprop(0.1, momentum=0.9, storage=storage).update(g[::-1], state)
                held = plain._replace(
                    count=state.count,
                    nu=jnp.asarray(decoded(state.nu), jnp.float32),
                    trace=jnp.asarray(decoded(state.trace), jnp.float32),
                )
                found[name, steps] = (
                    derivatives(arguments, storage, jax.lax.stop_gradient(state)),
                    derivatives(arguments, None, jax.lax.stop_gradient(held)),
                )
        return found

    names = (
        "learning_rate",
        "decay",
        "g",
        "learning_rate, forward",
        "decay, forward",
        "g, forward",
    )
    for (name, steps), (got, want) in pairs(0.1, 0.9, g).items():
        rtol, atol = (1e-4, 1e-5) if name == "q8" else (2.0**-6, 1e-3)
        for argument, a, b in zip(names, got, want, strict=True):
            with subtests.test(storage=name, steps=steps, by=argument):
                assert np.any(b != 0)
                np.testing.assert_allclose(a, b, rtol, atol * np.max(np.abs(b)))

"""Gradients that are not finite, decays of 0 and 1, and derivatives: as without a storage."""

import jax
import jax.numpy as jnp
import numpy as np

from helpers import assert_moved
from rmsprop_jax import low_memory, rmsprop
from small_states import FORMS, STORAGES, after, fields, row, table, values


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


def test_an_update_has_the_derivatives_of_float32(subtests):
    """By learning rate, decay and gradient, where nothing is stored yet; forward and in reverse.

    What is used as it is stored has those of what was rounded. In bfloat16 they are taken at the
    second moment that is stored, to 2^-8.
    """
    g = jnp.asarray(np.broadcast_to(row(1)[0], (64, 128)))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(g.shape), jnp.float32)

    def update(learning_rate, decay, g, storage):
        tx = rmsprop(learning_rate, decay, 1e-3, momentum=0.9, storage=storage)
        return jnp.sum(weights * tx.update(g, tx.init(g))[0])

    @jax.jit
    def derivatives(*arguments):
        by = jax.grad(update, argnums=(0, 1, 2))
        forward = jax.jacfwd(update, argnums=(0, 1))
        storages = (None, *STORAGES.values())
        return [by(*arguments, one) + forward(*arguments, one) for one in storages]

    want, *others = derivatives(0.1, 0.9, g)
    assert all(np.any(derivative != 0) for derivative in want)
    names = ("learning_rate", "decay", "g", "learning_rate, forward", "decay, forward")
    for name, got in zip(STORAGES, others, strict=True):
        rtol, atol = (1e-4, 1e-6) if name == "q8" else (2.0**-6, 1e-3)
        for argument, a, b in zip(names, got, want, strict=True):
            with subtests.test(storage=name, by=argument):
                np.testing.assert_allclose(a, b, rtol, atol * np.max(np.abs(b)))

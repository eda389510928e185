"""Steps on the touched rows match dense steps with zero gradients for all other rows."""

import functools
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
from rmsprop_jax import dialects, rmsprop, rows

N, WIDTH, BATCH, STEPS = 30, 3, 6, 200
RATE = 0.01
FORMS = {
    "plain": {},
    "eps outside": {"eps_in_sqrt": False, "decay": 0.999, "initial_scale": 1.0},
    "centered": {"centered": True},
    "momentum": {"momentum": 0.9},
    "momentum, centered": {"momentum": 0.9, "centered": True},
    "momentum, nesterov": {"momentum": 0.9, "nesterov": True},
    "rate after momentum": {"momentum": 0.9, "nesterov": True, "lr_in_momentum": False},
    "falling rate": {"learning_rate": optax.linear_schedule(RATE, 0, STEPS), "momentum": 0.9},
    "eps by schedule": {"eps": optax.linear_schedule(1e-2, 1e-8, STEPS)},
    "bias correction": {"bias_correction": True, "decay": 0.99},
    "bias correction, centered": {"bias_correction": True, "centered": True, "momentum": 0.5},
    "weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "weight decay, momentum": {
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "momentum": 0.9,
        "nesterov": True,
        "lr_in_momentum": False,
    },
    # Where momentum and weight decay are the same power: 1 - .01 * 50 = .5.
    "equal powers": {"weight_decay": 50.0, "decoupled_weight_decay": True, "momentum": 0.5},
    "momentum above": {"weight_decay": 50.0, "decoupled_weight_decay": True, "momentum": 0.75},
    "decay 0": {"decay": 0.0, "momentum": 0.0},
    "decay 1": {"decay": 1.0, "initial_scale": 1.0, "momentum": 1.0},
    "up": {"maximize": True, "learning_rate": -RATE, "momentum": 0.9},
}
COMPLEX = {"split": {"split_complex": True, "centered": True, "momentum": 0.9}}


class Batches(NamedTuple):
    """Of all steps: rows, repeated and few at times, and their gradients, of sizes 1e-3 to 10."""

    indices: np.ndarray
    grads: np.ndarray


def batches(dtype, steps=STEPS, seed=0):
    rng = np.random.default_rng(seed)
    among = np.where(np.arange(steps) % 3 == 0, 5, N)[:, None]
    indices = rng.integers(0, among, (steps, BATCH))

    def numbers():
        return rng.standard_normal((steps, BATCH, WIDTH)) * 10.0 ** rng.integers(
            -3, 2, (steps, 1, 1)
        )

    grads = numbers() + 1j * numbers() if np.issubdtype(dtype, np.complexfloating) else numbers()
    return Batches(indices, grads.astype(dtype))


def first_table(dtype):
    rng = np.random.default_rng(1)
    table = rng.standard_normal((N, WIDTH))
    if np.issubdtype(dtype, np.complexfloating):
        table = table + 1j * rng.standard_normal((N, WIDTH))
    return table.astype(dtype)


def dense_gradient(indices, grads):
    return jnp.zeros((N, WIDTH), grads.dtype).at[indices].add(grads)


@functools.partial(jax.jit, static_argnums=0)
def side_by_side(make, table, batches):
    """Both tables and states at the end, and at every step the rows that a forward pass sees."""
    found = {}
    for form, tx in make().items():

        def step(carry, batch, tx=tx):
            table, state, dense, dense_state = carry
            table, state = rows.advance(tx, batch.indices, table, state)
            seen = table[batch.indices], dense[batch.indices]
            table, state = rows.update(tx, *batch, table, state)
            updates, dense_state = tx.update(dense_gradient(*batch), dense_state, dense)
            dense = optax.apply_updates(dense, updates)
            return (table, state, dense, dense_state), seen

        start = (table, rows.init(tx, table), table, tx.init(table))
        (mine, state, *theirs), seen = jax.lax.scan(step, start, batches)
        found[form] = rows.settle(tx, mine, state), theirs, seen
    return found


def make(forms):
    return {form: rmsprop(**({"learning_rate": RATE} | FORMS[form])) for form in forms}


def make_all():
    return make(FORMS)


def make_complex():
    return {form: rmsprop(RATE, **kwargs) for form, kwargs in COMPLEX.items()} | make(
        ["momentum, centered", "weight decay"]
    )


def assert_same_way(found, bound, subtests):
    for form, ((table, state), (dense, dense_state), (seen, seen_there)) in found.items():
        with subtests.test(form=form):
            largest = np.abs(dense).max()
            assert np.abs(table - dense).max() <= bound * largest
            assert np.abs(seen - seen_there).max() <= bound * np.abs(seen_there).max()
            assert state.inner.count == dense_state.count == STEPS
            np.testing.assert_array_equal(state.steps, STEPS)
            for field in ("nu", "mu", "trace", "weight_sum"):
                mine, theirs = getattr(state.inner, field), getattr(dense_state, field)
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    assert np.abs(mine - theirs).max() <= bound * np.abs(theirs).max()


def test_every_form_goes_the_way_of_dense_steps(subtests):
    """In float64, to 1e-11 of the largest number: 1.5e-13 was the most."""
    with jax.enable_x64(True):
        found = side_by_side(make_all, first_table(np.float64), batches(np.float64))
    assert_same_way(jax.device_get(found), 1e-11, subtests)


def test_every_form_goes_the_way_of_dense_steps_in_float32(subtests):
    """To 5e-6: the dense way rounds in each of 200 steps; 2e-6 was the most.

    At decay 1 nothing is forgotten, and both are farther from the truth.
    """
    found = side_by_side(make_all, first_table(np.float32), batches(np.float32))
    assert_same_way(jax.device_get(found), 5e-6, subtests)


def test_complex_tables(subtests):
    with jax.enable_x64(True):
        found = side_by_side(make_complex, first_table(np.complex128), batches(np.complex128))
    assert_same_way(jax.device_get(found), 1e-11, subtests)


def test_a_loop_in_numpy_goes_the_same_way(subtests):
    """Of the rule's definitions, over whole gradients, where parameters stand still: no decay."""
    steps = batches(np.float64, 40)
    whole = [np.zeros((N, WIDTH)) for _ in steps.indices]
    for gradient, at, grads in zip(whole, *steps, strict=True):
        np.add.at(gradient, at, grads)
    forms = ("plain", "momentum, centered", "rate after momentum", "bias correction, centered")
    with jax.enable_x64(True):
        found = side_by_side(lambda: make(forms), first_table(np.float64), steps)
    for form in forms:
        with subtests.test(form=form):
            moves = reference.run(whole, learning_rate=RATE, **FORMS[form])
            want = first_table(np.float64) + np.sum(moves, axis=0)
            np.testing.assert_allclose(found[form][0][0], want, rtol=1e-11, atol=1e-11)


PATTERN = st.lists(
    st.lists(st.integers(0, N), min_size=BATCH, max_size=BATCH), min_size=12, max_size=12
)
TX = {
    "momentum, centered": {"momentum": 0.9, "centered": True},
    "bias": {"bias_correction": True, "momentum": 0.5, "nesterov": True},
    "decay": {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum": 0.9},
}


@settings(max_examples=60, deadline=None)
@given(PATTERN, st.integers(0, 3))
def test_whichever_rows_are_touched(pattern, seed):
    """With padding among them, and rows touched in all steps or none; to 1e-11 in float64."""
    with jax.enable_x64(True):
        steps = batches(np.float64, len(pattern), seed)._replace(indices=np.array(pattern))
        found = jax.device_get(side_by_side(make_three, first_table(np.float64), steps))
    for (table, _), (dense, _), _ in found.values():
        np.testing.assert_allclose(table, dense, rtol=0, atol=1e-11)


def make_three():
    return {form: rmsprop(RATE, **kwargs) for form, kwargs in TX.items()}


def test_many_steps_are_missed_at_once(subtests):
    """A row that comes back after 10 to 2^24 + 1 steps, by closed forms in float64 of NumPy.

    To 2e-6 of s, where it is not below what float32 holds; its exponential has an error of its own.
    """
    tx = rmsprop(RATE, decay=0.9999, momentum=0.999, centered=True)
    table = jnp.ones((2, 1))
    table, state = rows.update(tx, jnp.array([0]), jnp.ones((1, 1)), table, rows.init(tx, table))
    nu, mu, b = (float(getattr(state.inner, name)[0, 0]) for name in ("nu", "mu", "trace"))
    x = float(table[0, 0])
    for k in (1, 10, 1000, 100_000, 2**24 + 1):
        with subtests.test(k=k):
            later = state._replace(inner=state.inner._replace(count=jnp.int32(1 + k)))
            found, settled = rows.settle(tx, table, later)
            r = 0.9999**k
            np.testing.assert_allclose(settled.inner.mu[0, 0], r * mu, 2e-6, 1e-38)
            variance = r * (nu + (1 - r) * mu**2)
            np.testing.assert_allclose(settled.inner.nu[0, 0], variance, 2e-6, 1e-38)
            np.testing.assert_allclose(settled.inner.trace[0, 0], 0.999**k * b, 2e-6, 1e-38)
            way = b * 0.999 * (1 - 0.999**k) / (1 - 0.999)
            np.testing.assert_allclose(found[0, 0], x - way, 2e-6)
            assert found[1, 0] == 1


def test_arrays_are_hyperparameters_as_numbers_are():
    """And may be learned: the derivative by the momentum is that of differences."""
    steps = jax.tree.map(lambda a: a[:20], batches(np.float64))

    def last(tx, table):
        state = rows.init(tx, table)
        for batch in zip(*steps, strict=True):
            table, state = rows.update(tx, *map(jnp.asarray, batch), table, state)
        return rows.settle(tx, table, state)[0]

    with jax.enable_x64(True):
        table = jnp.asarray(first_table(np.float64))
        kwargs = {"learning_rate": 0.01, "decay": 0.9, "momentum": 0.9, "eps": 1e-8}
        arrays = {name: jnp.asarray(value) for name, value in kwargs.items()}
        by_arrays = jax.jit(lambda arrays: last(rmsprop(**arrays), table))
        found, want = by_arrays(arrays), jax.jit(lambda: last(rmsprop(**kwargs), table))()
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-13)

        def loss(momentum):
            return jnp.sum(jnp.sin(by_arrays(arrays | {"momentum": momentum})))

        slope = jax.grad(loss)(jnp.asarray(0.9))
        difference = (loss(jnp.asarray(0.9 + 1e-6)) - loss(jnp.asarray(0.9 - 1e-6))) / 2e-6
        np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_dense_steps_go_on_and_come_back(subtests):
    """Rows, then dense, then rows: the whole way is dense; for a dialect, too."""
    txs = {"ours": rmsprop(RATE, momentum=0.9), "timm": dialects.timm(RATE, momentum=0.9)}
    grads = batches(np.float64, 30)
    with jax.enable_x64(True):
        for name, tx in txs.items():
            with subtests.test(name):
                table = jnp.asarray(first_table(np.float64))
                state, dense, dense_state = rows.init(tx, table), table, tx.init(table)
                update = jax.jit(functools.partial(rows.update, tx))
                for i, batch in enumerate(zip(*grads, strict=True)):
                    at, g = map(jnp.asarray, batch)
                    gradient = dense_gradient(at, g)
                    updates, dense_state = tx.update(gradient, dense_state, dense)
                    dense = optax.apply_updates(dense, updates)
                    if i == 10:
                        table, state = rows.settle(tx, table, state)
                        inner = state.inner
                    if 10 <= i < 20:
                        updates, inner = tx.update(gradient, inner, table)
                        table = optax.apply_updates(table, updates)
                    else:
                        state = rows.init(tx, table, inner) if i == 20 else state
                        table, state = update(at, g, table, state)
                table, state = rows.settle(tx, table, state)
                np.testing.assert_allclose(table, dense, rtol=0, atol=1e-12)
                np.testing.assert_allclose(state.inner.trace, dense_state.trace, 0, 1e-12)


@pytest.mark.parametrize("shape", [(7,), (7, 2, 3)])
def test_rows_have_any_shape(shape):
    tx = rmsprop(RATE, momentum=0.9, centered=True)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    state, dense, dense_state = rows.init(tx, table), table, tx.init(table)
    for _ in range(4):
        at = rng.integers(0, 7, (2, 2))
        g = jnp.asarray(rng.standard_normal((2, 2, *shape[1:])), jnp.float32)
        table, state = rows.update(tx, at, g, table, state)
        whole = jnp.zeros(shape).at[at].add(g)
        updates, dense_state = tx.update(whole, dense_state, dense)
        dense = optax.apply_updates(dense, updates)
    np.testing.assert_allclose(rows.settle(tx, table, state)[0], dense, rtol=1e-5, atol=1e-6)

"""The table "What you gain over optax.rmsprop" of the README: a test for each of its rows."""

from pathlib import Path
import re

import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from helpers import assert_close, run
import reference
from rmsprop_jax import rmsprop

ROWS = {}


def row(case):
    """Registers a test under the first column of the table."""

    def register(test):
        ROWS[case] = test
        return test

    return register


@row("float16: a zero gradient, 1e-4, 300")
def float16():
    grads = [jnp.asarray([0, 1e-4, 300], jnp.float16)] * 20
    got, state = run(rmsprop(0.01), grads)
    want = reference.run([np.asarray(g, float) for g in grads], learning_rate=0.01)
    assert_close(got, want, 2**-10, 0)  # one unit in the last place
    assert state.nu.dtype == jnp.float32


@row("bfloat16 at decay .999, after 5,000 steps of gradient 1")
def bfloat16():
    tx = rmsprop(0.01, decay=0.999)
    g = jnp.ones(2, jnp.bfloat16)

    def step(state, _):
        return tx.update(g, state)[1], None

    state, _ = jax.lax.scan(step, tx.init(g), length=5000)
    np.testing.assert_allclose(state.nu, 1 - 0.999**5000, rtol=1e-4)


@row("bfloat16 parameters with float32 gradients")
def mixed_precision():
    tx = rmsprop(0.01, momentum=0.9)
    g = jnp.ones(2)

    def step(state, _):
        return tx.update(g, state)[1], None

    jax.lax.scan(step, tx.init(g.astype(jnp.bfloat16)), length=3)  # refuses to change dtypes
    guarded = optax.apply_if_finite(tx, 3)
    jax.jit(guarded.update)(g, guarded.init(g.astype(jnp.bfloat16)))


@row("centered, constant gradients")
def centered():
    grads = [np.float32([1.0, -3e-3, 250.0])] * 400
    got, state = run(rmsprop(1.0, centered=True, eps=1e-6), grads)
    # The variance is known: g^2 gamma^t (1 - gamma^t). Its float32 rounding, some 1e-7 of g^2,
    # shows once gamma^t is as small, and by then eps has taken over for the smallest g only.
    for t in range(1, 60):
        g = grads[0].astype(float)
        variance = g**2 * 0.9**t * (1 - 0.9**t)
        np.testing.assert_allclose(got[t - 1], -g / np.sqrt(variance + 1e-6), rtol=2e-3)
    assert np.all(np.isfinite(got))
    assert bool(jnp.all(state.nu >= 0))


@row("bias correction under a scheduled decay")
def scheduled_bias_correction():
    schedule = optax.linear_schedule(0.5, 0.99, 10)
    got, _ = run(rmsprop(1.0, schedule, eps=0.0, bias_correction=True), [jnp.float32([2.0])] * 20)
    np.testing.assert_allclose(got, -1, rtol=1e-6)


@row("eps outside the root: the derivative of the update at gradient 0")
def derivative_at_zero():
    def update(g):
        tx = rmsprop(0.1, eps=1e-3, eps_in_sqrt=False)
        return tx.update(g, tx.init(g))[0].sum()

    # g / (sqrt(0.1) |g| + eps) has slope 1 / eps at 0.
    np.testing.assert_allclose(jax.grad(update)(jnp.zeros(3)), -100, rtol=1e-6)


@row("eps 0 and a zero gradient")
def zero_over_zero():
    got, _ = run(rmsprop(0.1, eps=0.0), [jnp.zeros(3)])
    np.testing.assert_array_equal(got[0], 0)


@row("one infinite gradient")
def infinity():
    tx = rmsprop(0.1, decay=0.5)
    state = tx.init(jnp.ones(2))
    updates, state = tx.update(jnp.asarray([jnp.inf, 1.0]), state)
    assert bool(jnp.all(jnp.isfinite(updates)))

    def step(state, _):
        updates, state = tx.update(jnp.ones(2), state)
        return state, updates

    _, updates = jax.lax.scan(step, state, length=200)
    np.testing.assert_allclose(updates[-1, 0], updates[-1, 1], rtol=1e-6)


@row("complex64 parameters")
def complex64():
    state = rmsprop(0.1).init(jnp.ones(100, jnp.complex64))
    assert state.nu.nbytes == 400


@row("a schedule as decay, eps or momentum")
def schedules():
    tx = rmsprop(0.1, decay=lambda t: 0.9, eps=lambda t: 1e-8, momentum=lambda t: 0.5)
    assert_close(
        run(tx, [jnp.ones(2)] * 3)[0], run(rmsprop(0.1, momentum=0.5), [jnp.ones(2)] * 3)[0], 0, 0
    )


@row("a gradient of None for one leaf")
def none_gradient():
    tx = rmsprop(0.1)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    _, state = tx.update({"a": None, "b": jnp.ones(2)}, tx.init(params))
    np.testing.assert_array_equal(state.nu["a"], 0)


@row("a (3, 1) gradient for a (1, 3) parameter")
def broadcasting():
    tx = rmsprop(0.1)
    with pytest.raises(AssertionError, match=r"float32\[3, 1\], nu float32\[1, 3\]"):
        tx.update(jnp.ones((3, 1)), tx.init(jnp.ones((1, 3))))


@row("decay 1.5, eps -1, learning rate NaN; nesterov without momentum")
def bad_numbers():
    for bad in ({"decay": 1.5}, {"eps": -1}, {"learning_rate": float("nan")}, {"nesterov": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            rmsprop(**{"learning_rate": 0.1} | bad)


@row("`jax.jit(tx.init)` of sharded parameters")
def sharded_init():
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
        sharding = NamedSharding(mesh, PartitionSpec("x"))
        state = jax.jit(rmsprop(0.1).init)(jax.device_put(jnp.ones(16), sharding))
        assert state.nu.sharding.is_equivalent_to(sharding, 1)


@row("integer parameters, float0 gradients")
def integers():
    with pytest.raises(TypeError, match="parameter 'n' must be floating or complex, got int32"):
        rmsprop(0.1).init({"n": jnp.arange(3)})
    with pytest.raises(AssertionError, match="float0"):
        rmsprop(0.1).update(np.zeros(3, jax.dtypes.float0), rmsprop(0.1).init(jnp.ones(3)))


@row("`numpy_dtype_promotion('strict')` with a cosine schedule or bias correction")
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        run(rmsprop(optax.cosine_decay_schedule(0.1, 9), bias_correction=True), [jnp.ones(2)])


@row("x64 with an `np.float64` learning rate")
def x64():
    with jax.enable_x64(True):
        got, _ = run(rmsprop(np.float64(0.1)), [jnp.ones(2, jnp.float32)])
        assert got[0].dtype == np.float32


@row("`jax.export` of an update")
def exported():
    tx = rmsprop(0.1)
    g = jnp.ones(2)
    blob = export.export(jax.jit(tx.update))(g, tx.init(g)).serialize()
    updates, _ = export.deserialize(blob).call(g, tx.init(g))
    np.testing.assert_array_equal(updates, tx.update(g, tx.init(g))[0])


@pytest.mark.parametrize("case", ROWS)
def test_row(case):
    ROWS[case]()


def test_the_readme_lists_these_rows():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = readme.split("## What you gain over `optax.rmsprop`")[1].split("\n## ")[0]
    cases = [
        line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if " | " in line
    ]
    assert cases[2:] == list(ROWS)
    assert re.search(r"\| case \| optax", table)

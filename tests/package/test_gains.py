"""The table of gains on the page "From Optax": both sides of every row."""

from pathlib import Path

import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from helpers import assert_close, run_all
import reference
from rmsprop_jax import low_memory, rmsprop

ROWS, THEIRS = {}, {}
ONES = np.ones(2, np.float32)
FIRST = -0.1 / np.sqrt(0.1)  # step, at learning rate 0.1 and gradient 1


def run(tx, grads):
    """The updates of every step and the last state, in one program."""
    updates, states = run_all({"tx": tx}, grads)
    return updates["tx"], states["tx"]


def error_after_10_000_steps(tx):
    """Of normal gradients, relative, against the rule in long double; root mean square."""
    grads = np.random.default_rng(0).standard_normal((10_000, 128)).astype(np.float32)
    _, updates = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(grads[0]), grads)
    s, gamma = np.longdouble(0), np.longdouble(0.9999)
    for g in grads.astype(np.longdouble):
        s = gamma * s + (1 - gamma) * g * g
    want = -grads[-1] / np.sqrt(s)
    return np.sqrt(np.mean(((np.asarray(updates[-1]) - want) / want) ** 2))


def row(case, side=ROWS):
    """Registers a test of ours, or of optax's, under the first column of the table."""

    def register(test):
        side[case] = test
        return test

    return register


@row("float16: a zero gradient, 1e-4, 300")
def float16():
    grads = [np.float16([0, 1e-4, 300])] * 20
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

    state, _ = jax.lax.scan(step, tx.init(g.astype(jnp.bfloat16)), length=3)  # refuses other dtypes
    np.testing.assert_allclose(state.nu, 1 - 0.9**3, rtol=1e-6)
    guarded = optax.apply_if_finite(tx, 3)
    updates, _ = jax.jit(guarded.update)(g, guarded.init(g.astype(jnp.bfloat16)))
    np.testing.assert_allclose(updates, FIRST / 10, rtol=1e-6)


def after_300_steps(tx):
    """A bfloat16 parameter of 1, each step of which is .001 in float32, but for some first ones."""

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jnp.full((), 0.01, jnp.bfloat16), state, x)
        return (jnp.asarray(optax.apply_updates(x, updates), x.dtype), state), None

    x = jnp.ones((), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=300)
    return float(x)


@row("bfloat16 parameters: 300 steps of 0.001 from 1 (float32: 0.691)")
def sixteen_bits():
    assert after_300_steps(low_memory.master_weights(rmsprop(1e-3))) == 0.69140625
    assert after_300_steps(rmsprop(1e-3)) == 0.9921875


@row("centered, a constant gradient of 10.6")
def centered():
    got, state = run(rmsprop(1.0, centered=True), [np.float32([10.6])] * 400)
    # The variance is known: g^2 gamma^t (1 - gamma^t). Here float32 keeps it to 1e-3 for 60 steps.
    g = float(np.float32(10.6))
    for t in range(1, 60):
        variance = g**2 * 0.9**t * (1 - 0.9**t)
        np.testing.assert_allclose(got[t - 1], -g / np.sqrt(variance + 1e-8), rtol=1e-3)
    assert np.all(np.abs(got) <= g / np.sqrt(1e-8) * (1 + 1e-6))
    assert np.all(state.nu >= 0)


@row("bias correction under a scheduled decay")
def scheduled_bias_correction():
    schedule = optax.linear_schedule(0.5, 0.99, 10)
    got, _ = run(rmsprop(1.0, schedule, eps=0.0, bias_correction=True), [np.float32([2.0])] * 20)
    np.testing.assert_allclose(got, -1, rtol=1e-6)


@row("eps outside the root: the derivative of the update at gradient 0")
def derivative_at_zero():
    def update(g):
        tx = rmsprop(0.1, eps=1e-3, eps_in_sqrt=False)
        return tx.update(g, tx.init(g))[0].sum()

    # g / (sqrt(0.1) |g| + eps) has slope 1 / eps at 0.
    np.testing.assert_allclose(jax.jit(jax.grad(update))(np.zeros(3, np.float32)), -100, rtol=1e-6)


@row("eps 0 and a zero gradient")
def zero_over_zero():
    got, _ = run(rmsprop(0.1, eps=0.0), [np.float32([0, 0, 1])])
    np.testing.assert_array_equal(got[0, :2], 0)
    np.testing.assert_allclose(got[0, 2], FIRST, rtol=1e-6)


@row("one infinite gradient")
def infinity():
    tx = rmsprop(0.1, decay=0.5)
    updates, _ = run(tx, [np.float32([np.inf, 1])] + [ONES] * 200)
    assert np.all(np.isfinite(updates[0]))
    np.testing.assert_allclose(updates[-1], -0.1, rtol=1e-6)


@row("complex64 parameters")
def complex64():
    state = rmsprop(0.1).init(jnp.ones(100, jnp.complex64))
    assert state.nu.nbytes == 400


@row("a schedule as decay, eps or momentum")
def schedules():
    tx = rmsprop(0.1, decay=lambda t: 0.9, eps=lambda t: 1e-8, momentum=lambda t: 0.5)
    updates, _ = run_all({"scheduled": tx, "constant": rmsprop(0.1, momentum=0.5)}, [ONES] * 3)
    np.testing.assert_array_equal(updates["scheduled"], updates["constant"])
    np.testing.assert_allclose(updates["constant"][0], FIRST, rtol=1e-6)


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
    tx, params = rmsprop(0.1), {"n": jnp.arange(3), "w": ONES}
    state = tx.init(params)
    assert state.nu["n"] is None
    grads = jax.grad(lambda params: jnp.sum(params["w"]), allow_int=True)(params)
    assert grads["n"].dtype == jax.dtypes.float0
    updates, _ = tx.update(grads, state, params)
    assert updates["n"] is None
    assert jnp.all(updates["w"] < 0)


@row("`numpy_dtype_promotion('strict')` with a cosine schedule or bias correction")
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        tx = rmsprop(optax.cosine_decay_schedule(0.1, 9), bias_correction=True)
        got, _ = run(tx, [ONES])
    np.testing.assert_allclose(got[0], -0.1, rtol=1e-6)


@row("float32 at decay .9999, after 10,000 steps")
def digits():
    assert error_after_10_000_steps(rmsprop(1.0, 0.9999, 0.0)) < 1e-6


@row("x64 with an `np.float64` learning rate")
def x64():
    with jax.enable_x64(True):
        got, _ = run(rmsprop(np.float64(0.1)), [ONES])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got[0], FIRST, rtol=1e-6)


@row("`jax.export`, serialized")
def exported():
    tx = rmsprop(0.1)
    g = jnp.ones(2)
    blob = export.export(jax.jit(tx.update))(g, tx.init(g)).serialize()
    updates, _ = export.deserialize(blob).call(g, tx.init(g))
    np.testing.assert_array_equal(updates, tx.update(g, tx.init(g))[0])
    np.testing.assert_allclose(updates, FIRST, rtol=1e-6)


@row("float16: a zero gradient, 1e-4, 300", THEIRS)
def their_float16():
    got, state = run(optax.rmsprop(0.01), [np.float16([0, 1e-4, 300])] * 2)
    np.testing.assert_array_equal(got[0], np.asarray([np.nan, -np.inf, 0], np.float16))
    assert np.isinf(optax.tree.get(state, "nu")[2])
    assert got[1][2] == 0


@row("bfloat16 at decay .999, after 5,000 steps of gradient 1", THEIRS)
def their_bfloat16():
    tx = optax.rmsprop(0.01, decay=0.999)
    g = jnp.ones(2, jnp.bfloat16)
    state, _ = jax.lax.scan(lambda s, _: (tx.update(g, s)[1], None), tx.init(g), length=5000)
    np.testing.assert_array_equal(optax.tree.get(state, "nu"), 0.5)


@row("bfloat16 parameters with float32 gradients", THEIRS)
def their_mixed_precision():
    tx = optax.rmsprop(0.01, momentum=0.9)
    g = jnp.ones(2)
    half = g.astype(jnp.bfloat16)
    with pytest.raises(TypeError):
        jax.lax.scan(lambda s, _: (tx.update(g, s)[1], None), tx.init(half), length=3)
    guarded = optax.apply_if_finite(tx, 3)
    with pytest.raises(TypeError):
        guarded.update(g, guarded.init(half))


@row("bfloat16 parameters: 300 steps of 0.001 from 1 (float32: 0.691)", THEIRS)
def their_sixteen_bits():
    assert after_300_steps(optax.rmsprop(1e-3)) == 0.9921875


@row("centered, a constant gradient of 10.6", THEIRS)
def their_centered():
    got, _ = run(optax.rmsprop(1.0, centered=True), [np.float32([10.6])] * 400)
    assert np.isnan(got[-1][0])


@row("bias correction under a scheduled decay", THEIRS)
def their_scheduled_bias_correction():
    schedule = optax.linear_schedule(0.5, 0.99, 10)
    with pytest.raises(TypeError):
        run(optax.rmsprop(1.0, schedule, bias_correction=True), [np.float32([2.0])])
    tx = optax.inject_hyperparams(optax.rmsprop)(1.0, schedule, eps=0.0, bias_correction=True)
    got, _ = run(tx, [np.float32([2.0])] * 20)
    assert -0.4 < np.max(got) < -0.3  # where -1 is right


@row("eps outside the root: the derivative of the update at gradient 0", THEIRS)
def their_derivative_at_zero():
    def update(g):
        tx = optax.rmsprop(0.1, eps=1e-3, eps_in_sqrt=False)
        return tx.update(g, tx.init(g))[0].sum()

    assert np.all(np.isnan(jax.jit(jax.grad(update))(np.zeros(3, np.float32))))


@row("eps 0 and a zero gradient", THEIRS)
def their_zero_over_zero():
    assert np.all(np.isnan(run(optax.rmsprop(0.1, eps=0.0), [np.zeros(3, np.float32)])[0][0]))


@row("one infinite gradient", THEIRS)
def their_infinity():
    grads = [np.float32([np.inf])] + [np.ones(1, np.float32)] * 200
    got, _ = run(optax.rmsprop(0.1, decay=0.5), grads)
    assert np.isnan(got[0][0])
    np.testing.assert_array_equal(got[1:], 0)


@row("complex64 parameters", THEIRS)
def their_complex64():
    state = optax.rmsprop(0.1).init(jnp.ones(100, jnp.complex64))
    assert optax.tree.get(state, "nu").nbytes == 800


@row("a schedule as decay, eps or momentum", THEIRS)
def their_schedules():
    for name in ("decay", "eps", "momentum"):
        with pytest.raises(TypeError):
            run(optax.rmsprop(0.1, **{name: lambda t: 0.5}), [ONES])


@row("a gradient of None for one leaf", THEIRS)
def their_none_gradient():
    tx = optax.rmsprop(0.1)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    _, state = tx.update({"a": None, "b": jnp.ones(2)}, tx.init(params))
    assert optax.tree.get(state, "nu")["a"] is None


@row("a (3, 1) gradient for a (1, 3) parameter", THEIRS)
def their_broadcasting():
    tx = optax.rmsprop(0.1)
    assert tx.update(jnp.ones((3, 1)), tx.init(jnp.ones((1, 3))))[0].shape == (3, 3)


@row("decay 1.5, eps -1, learning rate NaN; nesterov without momentum", THEIRS)
def their_bad_numbers():
    for bad in ({"decay": 1.5}, {"eps": -1}, {"learning_rate": float("nan")}):
        assert np.all(np.isnan(run(optax.rmsprop(**{"learning_rate": 0.1} | bad), [ONES])[0]))
    run(optax.rmsprop(0.1, nesterov=True), [ONES])


@row("`jax.jit(tx.init)` of sharded parameters", THEIRS)
def their_sharded_init():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = jax.device_put(jnp.ones(16), sharding)
    nu = optax.tree.get(jax.jit(optax.rmsprop(0.1).init)(params), "nu")
    assert len(nu.sharding.device_set) == 1
    with jax.set_mesh(mesh):
        nu = optax.tree.get(jax.jit(optax.rmsprop(0.1).init)(params), "nu")
    assert nu.sharding.is_fully_replicated


@row("integer parameters, float0 gradients", THEIRS)
def their_integers():
    assert optax.tree.get(optax.rmsprop(0.1).init(jnp.arange(3)), "nu").dtype == jnp.int32
    with pytest.raises(TypeError):
        optax.rmsprop(0.1).update(
            np.zeros(3, jax.dtypes.float0), optax.rmsprop(0.1).init(jnp.ones(3))
        )


@row("`numpy_dtype_promotion('strict')` with a cosine schedule or bias correction", THEIRS)
def their_strict_promotion():
    for tx in (
        optax.rmsprop(optax.cosine_decay_schedule(0.1, 9)),
        optax.rmsprop(0.1, bias_correction=True),
    ):
        with (
            jax.numpy_dtype_promotion("strict"),
            pytest.raises(ValueError, match="promotion"),
        ):
            run(tx, [ONES])


@row("float32 at decay .9999, after 10,000 steps", THEIRS)
def their_digits():
    assert 3e-5 < error_after_10_000_steps(optax.rmsprop(1.0, 0.9999, 0.0)) < 4e-5


@row("x64 with an `np.float64` learning rate", THEIRS)
def their_x64():
    with jax.enable_x64(True):
        got, _ = run(optax.rmsprop(np.float64(0.1)), [ONES])
        assert got[0].dtype == np.float64


@row("`jax.export`, serialized", THEIRS)
def their_export():
    tx = optax.rmsprop(0.1)
    exported = export.export(jax.jit(tx.update))(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="register"):
        exported.serialize()


@pytest.mark.parametrize("case", ROWS)
def test_ours(case):
    ROWS[case]()


if optax.__version__ == "0.2.8":  # what the table speaks of

    @pytest.mark.parametrize("case", THEIRS)
    def test_theirs(case, default_promotion):
        THEIRS[case]()


def test_the_page_lists_these_rows():
    page = (Path(__file__).parents[2] / "docs/how-to/from-optax.md").read_text()
    table = page.split("## What you gain over `optax.rmsprop`")[1].split("\n## ")[0]
    cases = [
        line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if " | " in line
    ]
    assert cases[0] == "case"
    assert cases[2:] == list(ROWS) == list(THEIRS)

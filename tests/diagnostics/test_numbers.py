"""Each number that diagnostics tells, against a loop in float64 NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import gradients, scan_all
import reference
from rmsprop_jax import diagnostics, rmsprop, scale_by_rms

STEPS = 12
GRADS = gradients(STEPS + 1, (60,), dtype=np.float32, low=-7, high=1)
X = (np.random.default_rng(1).standard_normal(60) * 10.0 ** np.linspace(-3, 1, 60)).astype("f4")
PERCENTILES = {"p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95}


def falling(count):
    return 0.1 / (1 + count)


FORMS = {
    "plain": {"learning_rate": 0.01},
    "centered": {"learning_rate": 0.01, "centered": True, "eps": 1e-4},
    "eps outside": {"learning_rate": 0.01, "eps_in_sqrt": False, "eps": 1e-4},
    "corrected": {"learning_rate": 0.01, "bias_correction": True, "decay": 0.99},
    "corrected, centered": {"learning_rate": 0.01, "bias_correction": True, "centered": True},
    "momentum": {"learning_rate": 0.01, "momentum": 0.9, "lr_in_momentum": False},
    "cautious": {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True, "cautious": True},
    "started at 1": {"learning_rate": 0.01, "initial_scale": 1.0},
    "scheduled": {"learning_rate": falling, "eps": lambda count: 1e-6 * (1 + count)},
    "climbing": {"learning_rate": -0.01, "eps": 1e-12},
    "decayed": {"learning_rate": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "coupled": {"learning_rate": 0.01, "weight_decay": 0.1, "eps": 1e-4},
}


def second_moment(grads, xs, form):
    """Of a loop: the second moment of the past gradients, or their variance, with its weights."""
    decay, s, m, w = form.get("decay", 0.9), form.get("initial_scale", 0.0), 0.0, 0.0
    for g, x in zip(grads, xs, strict=True):
        if not form.get("decoupled_weight_decay"):
            g = g + form.get("weight_decay", 0.0) * x
        s = decay * s + (1 - decay) * g**2
        m = decay * m + (1 - decay) * g
        w = decay * w + (1 - decay)
    w = w if form.get("bias_correction") else 1.0
    return s / w - (m / w) ** 2 if form.get("centered") else s / w


def percentile(numbers, percent):
    return np.sort(numbers)[math.ceil(len(numbers) * percent / 100) - 1]


def expected(form):
    """Of STEPS steps, and the one that follows."""

    def at(name, default, t=STEPS):
        value = form.get(name, default)
        return value(t) if callable(value) else value

    numbers = {n: [at(n, None, t) for t in range(STEPS + 1)] for n in form if callable(form[n])}
    updates = reference.run(GRADS, X, **(form | numbers), dtype=np.float64)
    xs = [X.astype(float) + sum(updates[:t]) for t in range(STEPS + 1)]
    s = second_moment([g.astype(float) for g in GRADS[:-1]], xs[:-1], form)
    rate, eps = abs(at("learning_rate", None)), at("eps", 1e-8)
    in_sqrt = form.get("eps_in_sqrt", True)
    effective = rate / (np.sqrt(s + eps) if in_sqrt else np.sqrt(s) + eps)
    x, u = xs[-1], updates[-1]
    narrow = x.astype(np.float32).astype(jnp.bfloat16)
    lost = (narrow.astype(float) + u).astype(jnp.bfloat16) == narrow
    return {
        **{f"effective_lr/{name}": percentile(effective, p) for name, p in PERCENTILES.items()},
        "below_eps": np.mean(s < eps if in_sqrt else s < eps**2),
        "update/norm": np.linalg.norm(u),
        "update/relative_norm": np.linalg.norm(u) / np.linalg.norm(x),
        "update/lost_in_bfloat16": np.sum(lost & (u != 0)) / np.sum(u != 0),
        **dict.fromkeys(("not_finite/state", "not_finite/grads", "not_finite/params"), 0.0),
        **dict.fromkeys(("at_guard/second_moment", "at_guard/grads", "at_guard/update"), 0.0),
        "at_guard/root": 0.0,
        "state/bytes": 4
        + 4 * 60 * (1 + ("momentum" in form) + form.get("centered", False))
        + 4 * form.get("bias_correction", False),
    } | ({"at_guard/momentum": 0.0} if "momentum" in form else {})


TXS = {name: rmsprop(**form) for name, form in FORMS.items()}


@functools.cache
def ran():
    """Parameters and state of each form, traced in one program with what is told of them."""

    def run(grads, x):
        updates, states = scan_all(TXS, grads[:-1], x)
        xs = {name: x + updates[name].sum(0) for name in TXS}
        told = {n: diagnostics(tx, states[n], xs[n], grads[-1]) for n, tx in TXS.items()}
        return xs, states, told

    return jax.device_get(jax.jit(run)(np.stack(GRADS), X))


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    """A share to the number: none of 60 is within rounding of a bound."""
    got, want = ran()[2][form], expected(FORMS[form])
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == np.float32
        assert got[name].shape == ()
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=1e-7, err_msg=name)


def test_the_forms_reach_what_is_told():
    """Else 0 would be what is expected."""
    told = ran()[2]
    assert {round(float(told[name]["below_eps"]), 1) for name in FORMS} >= {0, 0.2, 0.6}
    assert all(0.05 < one["update/lost_in_bfloat16"] < 0.95 for one in told.values())


@pytest.mark.parametrize("form", ["centered", "scheduled"])
def test_eagerly_and_in_parts(form):
    """The same numbers without jit; without params or grads those that need them are left out."""
    xs, states, told = ran()
    tx, x, state, want = TXS[form], jnp.asarray(xs[form]), states[form], told[form]
    state = jax.tree.map(jnp.asarray, state)
    of_state = {n for n in want if n.startswith(("effective", "below", "state/bytes"))}
    of_state |= {"at_guard/root", "at_guard/second_moment", "not_finite/state"}
    of_grads = {"at_guard/grads", "not_finite/grads"}
    for args, names in (
        ((), of_state),
        ((x,), of_state | {"not_finite/params"}),
        ((None, jnp.asarray(GRADS[-1])), of_state | of_grads),
        ((x, jnp.asarray(GRADS[-1])), want.keys()),
    ):
        got = diagnostics(tx, state, *args)
        assert got.keys() == names
        for name in names:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)


def test_no_learning_rate():
    """That of scale_by_rms is -1."""
    g = jnp.array([0.5, 2.0])
    tx = scale_by_rms(decay=0.0)
    told = diagnostics(tx, tx.update(g, tx.init(g))[1])
    np.testing.assert_allclose(told["effective_lr/p5"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(told["effective_lr/p95"], 2.0, rtol=1e-6)


def test_what_is_not_finite():
    tx, x = rmsprop(0.1), jnp.array([1.0, jnp.nan, 2.0, 3.0])
    g = jnp.array([jnp.inf, 1.0, jnp.nan, 1.0])
    state = tx.update(g, tx.init(x))[1]
    told = diagnostics(tx, state, x, g)
    shares = {n: float(v) for n, v in told.items() if n.startswith("not_finite")}
    assert shares == {
        "not_finite/state": 0.25,
        "not_finite/params": 0.25,
        "not_finite/grads": 0.5,
    }
    # Of three numbers; an infinite gradient is clipped, and its s as large as that makes it.
    np.testing.assert_allclose(told["effective_lr/median"], 0.1 / np.sqrt(0.1), rtol=1e-6)
    assert told["at_guard/grads"] == told["at_guard/second_moment"] == 0.25
    nothing = diagnostics(tx, state._replace(nu=jnp.full(4, jnp.nan)))
    assert np.isnan(nothing["effective_lr/median"])


@pytest.mark.parametrize(
    ("form", "shares"),
    [
        # Where eps is 0, the root of s = 0 is the least; of 1e-30 it is not, as 1e-38 is less.
        ({"eps": 0.0}, {"at_guard/root": 1 / 3, "below_eps": 0}),
        # With a learning rate of 1e10 the least is 1e20 / 3.4e38.
        ({"eps": 0.0, "learning_rate": 1e10}, {"at_guard/root": 2 / 3, "below_eps": 0}),
        ({"eps": 1e-8, "learning_rate": 1e10}, {"at_guard/root": 0, "below_eps": 2 / 3}),
        ({"eps": 0.0, "eps_in_sqrt": False}, {"at_guard/root": 1 / 3, "below_eps": 0}),
        ({"eps": 1e-8, "eps_in_sqrt": False}, {"at_guard/root": 0, "below_eps": 2 / 3}),
    ],
    ids=range(5),
)
def test_the_least_root(form, shares):
    tx = rmsprop(**({"learning_rate": 0.1} | form), decay=0.0)
    g = jnp.array([0.0, 1e-15, 1.0])
    told = diagnostics(tx, tx.update(g, tx.init(g))[1])
    for name, share in shares.items():
        np.testing.assert_allclose(told[name], share, rtol=1e-6, err_msg=name)


def test_guards_of_gradients_momentum_and_updates():
    tx = rmsprop(1e38, momentum=1.0, decay=0.5)
    g = jnp.array([1e19, 1e18, 1.0, 0.0], jnp.float32)
    state = tx.init(g)
    for _ in range(3):
        _, state = tx.update(g, state)
    told = diagnostics(tx, state, g, g)
    assert told["at_guard/grads"] == 0.25  # above 4.6e18
    assert told["at_guard/second_moment"] == 0.25
    bound = np.finfo(np.float32).max
    assert told["at_guard/momentum"] == np.mean(np.abs(state.trace) >= bound / 4) == 0.25
    half = g.astype(jnp.float16).at[0].set(1)
    plain = rmsprop(1e6, decay=0.5)
    told = diagnostics(plain, plain.init(half), half, half)
    assert told["at_guard/update"] == 0.75  # 1e6 is beyond float16, whose largest is 65504


def test_complex_numbers_count_as_two():
    z = jnp.array([3 + 4j, 1e-6j, complex(1, np.inf)])
    for split, rates in ((False, 2), (True, 5)):
        tx = rmsprop(0.1, decay=0.0, split_complex=split)
        told = diagnostics(tx, tx.update(z, tx.init(z))[1], z, z)
        np.testing.assert_allclose(told["not_finite/grads"], 1 / 6, rtol=1e-6)
        s = [9, 16, 0, 1e-12, 1] if split else [25, 1e-12]
        assert len(s) == rates
        # What was infinite has a rate, the least.
        rate = 0.1 / np.sqrt(np.array(s) + 1e-8)
        np.testing.assert_allclose(told["effective_lr/p95"], rate.max(), rtol=1e-6)
        share = np.mean([one < 1e-8 for one in s] + [False])
        np.testing.assert_allclose(told["below_eps"], share, rtol=1e-6)


def test_float64():
    with jax.enable_x64(True):
        g = jnp.asarray(GRADS[0], jnp.float64)
        tx = rmsprop(0.1, eps=1e-12)
        told = diagnostics(tx, tx.update(g, tx.init(g))[1], g, g)
        rate = 0.1 / np.sqrt(0.1 * np.asarray(g) ** 2 + 1e-12)
        for name, percent in PERCENTILES.items():
            want = percentile(rate, percent)
            np.testing.assert_allclose(told[f"effective_lr/{name}"], want, rtol=1e-14)
        u = np.asarray(g) * 0.1 / np.sqrt(0.19 * np.asarray(g) ** 2 + 1e-12)
        np.testing.assert_allclose(told["update/norm"], np.linalg.norm(u), rtol=1e-13)


def test_nothing_to_tell():
    tx = rmsprop(0.1)
    told = diagnostics(tx, tx.init({}), {}, {})
    assert {n: float(v) for n, v in told.items()} == {"state/bytes": 4}
    empty = jnp.zeros((0, 3))
    assert diagnostics(tx, tx.init(empty), empty, empty).keys() == {
        "state/bytes",
        *(f"update/{name}" for name in ("norm", "relative_norm", "lost_in_bfloat16")),
    }


def test_derivatives_vmap_and_scan():
    """The median's derivatives are those of the number that it is."""
    g = jnp.array([0.1, 1.0, 3.0])

    def median(rate, nu):
        tx = rmsprop(rate, eps=1.0)
        state = tx.init(g)._replace(nu=nu)
        return diagnostics(tx, state)["effective_lr/median"]

    nu = g**2
    of_rate, of_nu = jax.grad(median, (0, 1))(0.5, nu)
    np.testing.assert_allclose(of_rate, 1 / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(of_nu, [0, -0.25 / 2**1.5, 0], rtol=1e-6)
    # Of equal numbers each has its share.
    np.testing.assert_allclose(
        jax.grad(median, 1)(0.5, jnp.ones(3)), np.full(3, -0.25 / 2**1.5 / 3), rtol=1e-6
    )
    rates = jnp.array([0.5, 2.0])
    want = rates / np.sqrt(2)
    np.testing.assert_allclose(jax.vmap(median, (0, None))(rates, nu), want, rtol=1e-6)
    _, got = jax.lax.scan(lambda carry, rate: (carry, median(rate, nu)), 0, rates)
    np.testing.assert_allclose(got, want, rtol=1e-6)

    def norm(x):
        tx = rmsprop(0.1, weight_decay=0.1, decoupled_weight_decay=True)
        return diagnostics(tx, tx.init(x), x, 0 * x)["update/norm"]

    np.testing.assert_allclose(jax.grad(norm)(jnp.array([3.0, 4.0])), [0.006, 0.008], rtol=1e-5)
    assert not jax.grad(norm)(jnp.zeros(2)).any()


def test_the_state_and_the_step_are_as_without():
    tx, x = TXS["momentum"], jnp.asarray(X)

    def step(state, g):
        told = diagnostics(tx, state, x, g)
        updates, state = tx.update(g, state, x)
        return state, (told, updates)

    state, (told, updates) = jax.lax.scan(step, tx.init(x), jnp.stack(GRADS))
    want, states = scan_all({"": tx}, jnp.stack(GRADS), x)
    np.testing.assert_allclose(state.nu, states[""].nu, rtol=1e-6)
    np.testing.assert_allclose(told["update/norm"], np.linalg.norm(updates, axis=1), rtol=1e-5)
    np.testing.assert_allclose(updates, want[""], rtol=1e-6)

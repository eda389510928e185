"""Finite in, finite out: hostile gradients in every dtype and every form of the rule."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import rmsprop

FORMS = [
    {"eps_in_sqrt": eps_in_sqrt, "eps": eps, **centered, **buffer}
    for eps_in_sqrt, eps, centered, buffer in itertools.product(
        (True, False),
        (1e-8, 0.0),
        (
            {},
            {"centered": True},
            {"bias_correction": True},
            {"centered": True, "bias_correction": True},
        ),
        (
            {},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.99, "lr_in_momentum": False, "cautious": True},
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
            {"weight_decay": 0.1, "momentum": 2.0, "maximize": True},
            {"momentum": 0.9, "split_complex": True},
        ),
    )
]
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


def hostile(dtype):
    """Zeros, the smallest and largest numbers of the dtype, and all in between."""
    info = jnp.finfo(dtype)
    sizes = [0.0, float(info.smallest_subnormal), float(info.tiny), float(info.eps)]
    sizes += [1e-3, 1.0, 300.0, float(info.max) ** 0.5, float(info.max)]
    values = np.asarray([s for size in sizes for s in (size, -size)])
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = (values[:, None] + 1j * values[None, :]).ravel()
    return jnp.asarray(values, dtype)


def assert_finite(tree, what):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert bool(jnp.all(jnp.isfinite(leaf))), f"{what}{jax.tree_util.keystr(path)}: {leaf}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_extreme_gradients(dtype, form):
    """The same, the negated and shuffled extremes: every pair of neighbours in time is met."""
    with jax.enable_x64(dtype in ("float64", "complex128")):
        g = hostile(dtype)
        tx = rmsprop(0.1, decay=0.5, **form)
        update = jax.jit(tx.update)
        params = jnp.ones_like(g)
        state = tx.init(params)
        rng = np.random.default_rng(0)
        for grads in [g, g, -g, *(rng.permutation(g) for _ in range(5))]:
            updates, state = update(jnp.asarray(grads, dtype), state, params)
            assert updates.dtype == dtype
            assert_finite(updates, "updates")
            assert_finite(state, "state")


@pytest.mark.parametrize("learning_rate", [3e38, -3e38, 0.0, 1e-45])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_extreme_learning_rates(learning_rate, form):
    g = hostile("float32")
    tx = rmsprop(learning_rate, decay=0.5, **form)
    update, state = jax.jit(tx.update), tx.init(g)
    for grads in (g, -g, g[::-1]) * 3:
        updates, state = update(grads, state, jnp.ones_like(g))
        assert_finite((updates, state), "")


@pytest.mark.parametrize("momentum", [1.0, 2.0, 3e38])
@pytest.mark.parametrize("weight_decay", [1.0, 3e38])
@pytest.mark.parametrize("learning_rate", [10.0, -3e38, 3e38])
@pytest.mark.parametrize("form", [{"nesterov": True}, {"lr_in_momentum": False}, {}], ids=str)
def test_extremes_of_everything(momentum, weight_decay, learning_rate, form):
    """A saturated buffer beside a saturated decay, in one direction and against each other."""
    g = hostile("float32")
    for eps in (0.0, 1e-45, 3e38):
        tx = rmsprop(
            learning_rate,
            eps=eps,
            momentum=momentum,
            weight_decay=weight_decay,
            decoupled_weight_decay=True,
            **form,
        )
        update, state = jax.jit(tx.update), tx.init(g)
        for i in range(12):
            updates, state = update(g, state, g if i % 2 else -g)
            assert_finite((updates, state), "")


@settings(max_examples=200, deadline=None)
@given(
    grads=st.lists(
        st.lists(st.floats(width=32, allow_nan=False), min_size=4, max_size=4),
        min_size=1,
        max_size=6,
    ),
    decay=st.floats(0, 1, width=32),
    eps=st.floats(0, 1, width=32),
    form=st.sampled_from([{k: v for k, v in form.items() if k != "eps"} for form in FORMS]),
)
def test_any_gradients_decay_and_eps(grads, decay, eps, form):
    """Infinite gradients too, and a decay of 0, 1 or next to them."""
    tx = rmsprop(0.1, decay=jnp.float32(decay), eps=jnp.float32(eps), **form)
    state = tx.init(jnp.zeros(4))
    for g in grads:
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state, jnp.ones(4))
        assert_finite((updates, state), "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"centered": True},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "cautious": True},
        {"bias_correction": True},
    ],
    ids=str,
)
def test_one_bad_number_stays_in_its_coordinate(dtype, bad, form):
    """NaN is not hidden, +-inf acts like the largest gradient; the neighbours never notice."""
    with jax.enable_x64(dtype in ("float64", "complex128")):
        tx = rmsprop(0.1, **form)
        good = jnp.asarray([1.0, 2.0, -3.0], dtype)
        params = jnp.ones(3, dtype)
        state = clean = tx.init(params)
        for g in (good, good.at[1].set(bad), good):
            updates, state = tx.update(g, state, params)
            expected, clean = tx.update(good, clean, params)
            if not (form.get("cautious") and np.isinf(bad)):  # the mean has to change then
                np.testing.assert_array_equal(updates[::2], expected[::2])
        if np.isnan(bad):
            assert bool(jnp.isnan(updates[1]))
        else:
            assert_finite((updates, state), "")


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_a_coordinate_recovers_from_inf(decay):
    """nu falls from (1 - decay) max / 16 to where g = 1 counts: about 86 / -ln(decay) steps."""
    tx = rmsprop(1.0, decay=decay)
    state = tx.init(jnp.zeros(1))
    _, state = tx.update(jnp.asarray([jnp.inf]), state)
    steps = int(86 / -np.log(decay))

    def size_after(n):
        def one(state, _):
            updates, state = tx.update(jnp.ones(1), state)
            return state, updates

        return abs(float(jax.lax.scan(one, state, length=n)[1][-1, 0]))

    assert size_after(steps // 2) < 1e-6
    assert size_after(2 * steps) > 0.99


def test_float16_saturates():
    """Centered and constant: the variance vanishes, the update is g / sqrt(eps) = 1e7."""
    tx = rmsprop(1.0, decay=0.0, centered=True)
    g = jnp.asarray([1000.0, -1000.0], jnp.float16)
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, np.asarray([-65504, 65504], np.float16))


def test_gradients_whose_square_underflows_move_by_at_most_the_usual_step():
    g = jnp.asarray([1e-30, 1e-25, 1e-21, 1e-19, 1e-10])
    tx = rmsprop(1.0, eps=0.0)
    updates, _ = tx.update(g, tx.init(g))
    assert bool(jnp.all(jnp.abs(updates) <= 1 / np.sqrt(0.1) * 1.001))
    np.testing.assert_allclose(updates[-1], -1 / np.sqrt(0.1), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_update_has_finite_derivatives(form):
    """With respect to gradients, parameters, state and every hyperparameter, zeros included."""
    g = jnp.asarray([0.0, 1e-30, 1e-3, 1.0, -300.0])

    def loss(g, params, hyper):
        tx = rmsprop(**{**form, **hyper})
        state, total = tx.init(params), 0.0
        for scale in (1.0, 0.5, 0.0):
            updates, state = tx.update(scale * g, state, params)
            total += jnp.sum(updates * jnp.arange(1.0, 6.0))
        return total

    hyper = {"learning_rate": 0.1, "decay": 0.9}
    # With eps 0 and the variance 0 of a first step, the derivative by eps really is infinite.
    if form["eps"] or not (form.get("centered") and form.get("bias_correction")):
        hyper["eps"] = form["eps"]
    for name in ("momentum", "weight_decay"):
        if name in form:
            hyper[name] = form[name]
    derivatives = jax.grad(loss, argnums=(0, 1, 2))(g, jnp.ones(5), hyper)
    assert_finite(derivatives, "d")


def test_apply_if_finite_skips_a_step_with_nan():
    tx = optax.apply_if_finite(rmsprop(0.1, momentum=0.9), max_consecutive_errors=3)
    state = tx.init(jnp.ones(2))
    _, before = tx.update(jnp.ones(2), state)
    updates, after = tx.update(jnp.asarray([1.0, jnp.nan]), before)
    np.testing.assert_array_equal(updates, 0)
    np.testing.assert_array_equal(after.inner_state.nu, before.inner_state.nu)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.9, 0.999]), st.integers(1, 400))
def test_no_step_is_longer_than_the_first_however_long_a_silence_was(seed, decay, n):
    """|u| <= learning_rate / sqrt(1 - decay), without any eps: s has the newest gradient in it."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-16, 18, (12, n)) * (rng.random((12, n)) < 0.3)
    tx = rmsprop(1.0, decay, 0.0)

    def step(state, grads):
        updates, state = tx.update(grads, state)
        return state, updates

    _, updates = jax.lax.scan(step, tx.init(jnp.zeros(n)), jnp.float32(sizes))
    assert np.all(abs(np.asarray(updates)) <= (1 + 1e-5) / np.sqrt(1 - decay))
    assert np.any(abs(np.asarray(updates)) > 0.99 / np.sqrt(1 - decay)) or not sizes.any()

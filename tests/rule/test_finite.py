"""Finite in, finite out: hostile gradients in every dtype and every form of the rule."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import rmsprop

# Of which each is also run with other numbers in the place of these.
FORMS = [
    {"eps_in_sqrt": eps_in_sqrt, **centered, **buffer}
    for eps_in_sqrt, centered, buffer in itertools.product(
        (True, False),
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
ROWS = 9  # gradients after each other


def is_wide(dtype):
    return dtype in ("float64", "complex128")


def numbers(dtype, **values):
    """Hyperparameters as arrays of the arithmetic's precision, so that all share a program."""
    return {name: np.asarray(v, "f8" if is_wide(dtype) else "f4") for name, v in values.items()}


def hostile(dtype):
    """Zeros, the smallest and largest numbers of the dtype, and all in between."""
    info = jnp.finfo(dtype)
    sizes = [0.0, float(info.smallest_subnormal), float(info.tiny), float(info.eps)]
    sizes += [1e-3, 1.0, 300.0, float(info.max) ** 0.5, float(info.max)]
    values = np.asarray([s for size in sizes for s in (size, -size)])
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = (values[:, None] + 1j * values[None, :]).ravel()
    return values.astype(jnp.dtype(dtype))


def all_finite(tree):
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


@jax.jit
def finite(grads, params, hyper):
    """Whether updates and states are finite in all steps, and nu is not 0 at last, by form."""

    def of(form):
        tx = rmsprop(**hyper, **{name: v for name, v in form.items() if name not in hyper})

        def step(state, g):
            updates, state = tx.update(g, state, params)
            assert updates.dtype == g.dtype
            return state, all_finite((updates, state))

        state, is_finite = jax.lax.scan(step, tx.init(params), grads)
        return jnp.all(is_finite), jnp.any(state.nu != 0)

    return {str(form): of(form) for form in FORMS}


def assert_all(subtests, found, **case):
    for form, (is_finite, is_full) in found.items():
        with subtests.test(form=form, **case):
            assert is_finite
            assert is_full


def test_extreme_gradients(subtests):
    """The same, the negated and shuffled extremes: every pair of neighbours in time is met."""
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        g = hostile(dtype)
        grads = np.stack([g, g, -g, *(rng.permutation(g) for _ in range(ROWS - 3))])
        for eps in (1e-8, 0.0):
            with jax.enable_x64(is_wide(dtype)):
                hyper = numbers(dtype, learning_rate=0.1, decay=0.5, eps=eps)
                assert_all(subtests, finite(grads, np.ones_like(g), hyper), dtype=dtype, eps=eps)


def test_extreme_learning_rates(subtests):
    g = hostile("float32")
    grads = np.stack([g, -g, g[::-1]] * (ROWS // 3))
    for learning_rate, eps in itertools.product((3e38, -3e38, 0.0, 1e-45), (1e-8, 0.0)):
        hyper = numbers("float32", learning_rate=learning_rate, decay=0.5, eps=eps)
        found = finite(grads, np.ones_like(g), hyper)
        assert_all(subtests, found, learning_rate=learning_rate, eps=eps)


@settings(max_examples=200, deadline=None)
@given(
    grads=arrays(np.float32, (ROWS, len(hostile("float32"))), elements={"allow_nan": False}),
    decay=st.floats(0, 1, width=32),
    eps=st.floats(0, 1, width=32),
)
def test_any_gradients_decay_and_eps(grads, decay, eps):
    """Infinite gradients too, and a decay of 0, 1 or next to them."""
    hyper = numbers("float32", learning_rate=0.1, decay=decay, eps=eps)
    found = finite(grads, np.ones_like(grads[0]), hyper)
    assert [form for form, (is_finite, _) in found.items() if not is_finite] == []


def test_what_is_under_the_root_bounds_a_step(subtests):
    """In the place of a clip, whatever s holds; a rate of up to 2 it leaves alone.

    At a decay of 1 the state stays, so that the root becomes all that it can be.
    """
    largest, tiny = np.finfo(np.float32).max, np.finfo(np.float32).tiny
    sizes = 2.0 ** np.arange(-126, 128)
    g = np.float32([*-sizes, 0, 1e-45, *sizes, largest, -largest, np.inf, -np.inf])
    grads, nu = (np.ravel(a) for a in np.meshgrid(g, np.float32([0, 1e-45, *sizes, largest])))
    momenta = {"plain": {}, "buffer": {"momentum": np.float32(0.5)}}

    @jax.jit
    def run(learning_rate, decay, eps):
        found = {}
        for (name, form), inside in itertools.product(momenta.items(), (True, False)):
            tx = rmsprop(learning_rate, decay, eps, eps_in_sqrt=inside, **form)
            found[name, inside] = tx.update(grads, tx.init(grads)._replace(nu=nu))[0]
        return found

    # Numbers below the smallest normal one may count as 0.
    s, known = (np.where(abs(a) < tiny, 0, np.float64(a)) for a in (nu, grads))
    known = np.clip(known, -(2.0**62), 2.0**62)
    for size, decay, eps in itertools.product(
        (0.0, 1e-45, 1e-3, 1.0, 2.0, 3.0, 1e10, 1e20, largest), (0.0, 0.9, 1.0), (0.0, 1e-8)
    ):
        for rate in np.float32([size, -size]):
            for form, got in run(rate, np.float32(decay), np.float32(eps)).items():
                with subtests.test(form=form, rate=rate, decay=decay, eps=eps):
                    assert np.max(abs(got)) <= 0.251 * largest
                    if decay == 1 and eps == 0 and 1e-3 <= size <= 2:
                        want = -np.float64(rate) * known / np.sqrt(s + tiny)
                        np.testing.assert_allclose(got, want, rtol=1e-6, atol=2 * tiny)


def test_extremes_of_everything(subtests):
    """A saturated buffer beside a saturated decay, in one direction and against each other."""
    g = hostile("float32")
    forms = [{"nesterov": True}, {"lr_in_momentum": False}, {"cautious": True}, {}]

    @jax.jit
    def run(hyper):
        found = {}
        for form in forms:
            tx = rmsprop(**hyper, decoupled_weight_decay=True, **form)

            def step(state, sign, tx=tx):
                updates, state = tx.update(g, state, sign * g)
                return state, all_finite((updates, state))

            signs = np.tile(np.float32([-1, 1]), 6)
            state, is_finite = jax.lax.scan(step, tx.init(g), signs)
            found[str(form)] = jnp.all(is_finite), jnp.any(state.nu != 0)
        return found

    for momentum, weight_decay, learning_rate, eps in itertools.product(
        (1.0, 2.0, 3e38), (1.0, 3e38), (0.0, 10.0, -3e38, 3e38), (0.0, 1e-45, 3e38)
    ):
        values = {
            "momentum": momentum,
            "weight_decay": weight_decay,
            "learning_rate": learning_rate,
            "eps": eps,
        }
        assert_all(subtests, run(numbers("float32", **values)), **values)


def test_one_bad_number_stays_in_its_coordinate(subtests):
    """NaN is not hidden, +-inf acts like the largest gradient; the neighbours never notice."""
    forms = [
        {},
        {"centered": True},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "cautious": True},
        {"bias_correction": True},
    ]
    txs = {str(form): rmsprop(0.1, **form) for form in forms}

    @jax.jit
    def run(grads):
        runs = {}
        for name, tx in txs.items():
            state, updates = tx.init(jnp.ones_like(grads[0])), []
            for g in grads:
                u, state = tx.update(g, state)
                updates.append(u)
            runs[name] = jnp.stack(updates), all_finite((u, state))
        return runs

    for dtype in DTYPES:
        with jax.enable_x64(is_wide(dtype)):
            good = np.asarray([[1.0, 2.0, -3.0]] * 3, jnp.dtype(dtype))
            clean = run(good)
            for bad in (np.nan, np.inf, -np.inf):
                grads = good.copy()
                grads[1, 1] = bad
                for form, (updates, is_finite) in run(grads).items():
                    with subtests.test(form=form, dtype=dtype, bad=bad):
                        if not ("cautious" in form and np.isinf(bad)):  # the mean changes then
                            want = clean[form][0]
                            np.testing.assert_array_equal(updates[:, ::2], want[:, ::2])
                        assert np.isnan(updates[-1, 1]) if np.isnan(bad) else is_finite


def test_a_coordinate_recovers_from_inf(subtests):
    """nu falls from (1 - decay) max / 16 to where g = 1 counts: about 86 / -ln(decay) steps."""

    @jax.jit
    def size_after(n, decay):
        tx = rmsprop(1.0, decay=decay)
        one = jnp.ones(1)
        _, state = tx.update(jnp.full(1, jnp.inf), tx.init(one))
        state = jax.lax.fori_loop(1, n, lambda _, state: tx.update(one, state)[1], state)
        return abs(tx.update(one, state)[0][0])

    for decay in (0.5, 0.9, 0.99):
        with subtests.test(decay=decay):
            steps = int(86 / -np.log(decay))
            assert size_after(steps // 2, np.float32(decay)) < 1e-6
            assert size_after(2 * steps, np.float32(decay)) > 0.99


def test_float16_saturates():
    """Centered and constant: the variance vanishes, the update is g / sqrt(eps) = 1e7."""
    tx = rmsprop(1.0, decay=0.0, centered=True)
    g = np.asarray([1000.0, -1000.0], np.float16)
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, np.asarray([-65504, 65504], np.float16))


def test_gradients_whose_square_underflows_move_by_at_most_the_usual_step():
    g = np.asarray([1e-30, 1e-25, 1e-21, 1e-19, 1e-10], np.float32)
    tx = rmsprop(1.0, eps=0.0)
    updates, _ = tx.update(g, tx.init(g))
    assert np.all(abs(np.asarray(updates)) <= 1 / np.sqrt(0.1) * 1.001)
    np.testing.assert_allclose(updates[-1], -1 / np.sqrt(0.1), rtol=1e-6)


def test_the_update_has_finite_derivatives(subtests):
    """With respect to gradients, parameters, state and every hyperparameter, zeros included."""
    g = np.asarray([0.0, 1e-30, 1e-3, 1.0, -300.0], np.float32)
    weights = np.arange(1.0, 6.0, dtype=np.float32)

    def derivatives(form, hyper):
        def loss(g, params, hyper):
            tx = rmsprop(**{**form, **hyper})

            def step(state, scale):
                updates, state = tx.update(scale * g, state, params)
                return state, jnp.sum(updates * weights)

            return jnp.sum(jax.lax.scan(step, tx.init(params), np.float32([1, 0.5, 0]))[1])

        hyper = hyper | {n: form[n] for n in ("momentum", "weight_decay") if n in form}
        of_g, of_x, of_hyper = jax.grad(loss, argnums=(0, 1, 2))(g, jnp.ones_like(g), hyper)
        some = {"some": jnp.where(of_hyper["learning_rate"] == 0, jnp.nan, 0.0)}
        return jax.tree.map(all_finite, {"g": of_g, "x": of_x} | of_hyper | some)

    run = jax.jit(lambda hyper: {str(form): derivatives(form, hyper) for form in FORMS})
    for eps in (1e-8, 0.0):
        found = run({"learning_rate": 0.1, "decay": 0.9, "eps": eps})
        for form in FORMS:
            by = found[str(form)]
            # With eps 0 and the variance 0 of a first step, that by eps really is infinite.
            if not eps and form.get("centered") and form.get("bias_correction"):
                del by["eps"]
            with subtests.test(form=form, eps=eps):
                assert [name for name, is_so in by.items() if not is_so] == []


def test_apply_if_finite_skips_a_step_with_nan():
    tx = optax.apply_if_finite(rmsprop(0.1, momentum=0.9), max_consecutive_errors=3)
    ones = np.ones(2, np.float32)
    _, before = tx.update(ones, tx.init(ones))
    updates, after = tx.update(np.float32([1.0, np.nan]), before)
    np.testing.assert_array_equal(updates, 0)
    assert np.all(np.asarray(before.inner_state.nu) > 0)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, before.inner_state)


@jax.jit
def steps_without_eps(grads, decay):
    tx = rmsprop(1.0, decay, 0.0)

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    return jax.lax.scan(step, tx.init(jnp.zeros_like(grads[0])), grads)[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.9, 0.999]))
def test_no_step_is_longer_than_the_first_however_long_a_silence_was(seed, decay):
    """|u| <= learning_rate / sqrt(1 - decay), without any eps: s has the newest gradient in it."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-16, 18, (12, 400)) * (rng.random((12, 400)) < 0.3)
    updates = abs(np.asarray(steps_without_eps(np.float32(sizes), np.float32(decay))))
    assert np.all(updates <= (1 + 1e-5) / np.sqrt(1 - decay))
    assert np.any(updates > 0.99 / np.sqrt(1 - decay))

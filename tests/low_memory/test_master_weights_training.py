"""Training with master weights, compared with training in float32."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_same, side_by_side
from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._arrays import unfused
from small_states import FORMS
from storages import STORAGES

pytestmark = pytest.mark.usefixtures("default_promotion")  # for optax.apply_updates

master_weights, join = low_memory.master_weights, low_memory.join_weights
BITS = (16, 24, 32)
GIVEN = optax.identity()  # gradients are the updates
RNG = np.random.default_rng(0)
SHAPES = {"w": (4, 32), "b": (16,), "s": ()}


def narrow(array):
    return jnp.asarray(array, jnp.bfloat16)


def trained(txs, params, grads, weights=None):
    """{name: (parameters, state)} after a scan over gradients, and the weights of all steps."""
    tx = side_by_side(txs)

    def step(carry, g):
        params, states = carry
        updates, states = tx.update(dict.fromkeys(txs, g), states, params)
        params = optax.apply_updates(params, updates)
        kept = {n: weights(params[n], states[n]) for n in txs} if weights else None
        return (params, states), kept

    def run(params, grads):
        params = {name: params[name] for name in txs}
        return jax.lax.scan(step, (params, tx.init(params)), grads)

    (params, states), kept = jax.jit(run)(params, grads)
    return {name: (params[name], states[name]) for name in txs}, kept


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_32_bits_are_float32_for_a_thousand_steps(dtype, subtests):
    """Bit for bit, in every form and storage, for gradients over five orders that are given."""
    forms = FORMS if dtype == "bfloat16" else FORMS[-1:]
    inner = {
        f"{storage} {form}": rmsprop(optax.cosine_decay_schedule(0.1, 1000), **form, storage=held)
        for form, (storage, held) in itertools.product(forms, STORAGES.items())
    }
    start = {name: jnp.asarray(RNG.standard_normal(s), jnp.bfloat16) for name, s in SHAPES.items()}
    grads = {
        name: jnp.asarray(RNG.standard_normal((1000, *s)) * 10.0 ** RNG.uniform(-4, 1, s), dtype)
        for name, s in SHAPES.items()
    }
    plain = {f"{name}, plain": rounded(tx) for name, tx in inner.items()}
    both = plain | {name: master_weights(tx, 32) for name, tx in inner.items()}
    wide = in_dtype(start, "float32")
    params = dict.fromkeys(plain, wide) | dict.fromkeys(inner, start)
    # The plain ones take gradients in float32 as well: updates have the gradients' dtype.
    runs, weights = trained(
        {n: in_float32(tx) for n, tx in both.items()},
        params,
        grads,
        lambda p, s: join(p, s) if p["w"].dtype == jnp.bfloat16 else p,
    )
    for name in inner:
        with subtests.test(name=name):
            jax.tree.map(np.testing.assert_array_equal, weights[name], weights[f"{name}, plain"])
            assert_same(runs[name][1].inner_state, runs[f"{name}, plain"][1])
            moved = np.abs(weights[name]["w"][-1] - wide["w"])
            assert np.all(moved > 0)


@pytest.mark.parametrize("bits", [16, 24])
def test_fewer_bits_walk_beside_float32_for_a_thousand_steps(bits, subtests):
    """Their distance is a sum of errors of less than a last place each, independent of mean 0.

    The standard deviation of one is half a place at most, so that of a thousand sqrt(1000) / 2.
    """
    n, rate = 1024, 1e-4
    inner = {name: rmsprop(rate, momentum=0.5, storage=held) for name, held in STORAGES.items()}
    txs = {f"{name}, plain": tx for name, tx in inner.items()}
    txs |= {name: master_weights(tx, bits) for name, tx in inner.items()}
    start = {"w": jnp.asarray(RNG.uniform(1, 1.5, (n // 64, 64)), jnp.bfloat16)}
    params = {name: start if name in inner else in_dtype(start, "float32") for name in txs}
    signs = RNG.choice([-1, 1, 1], (1000, n // 64, 64))
    runs, _ = trained(txs, params, {"w": jnp.asarray(signs * 0.01, jnp.float32)})
    for name in inner:
        with subtests.test(name=name):
            want = np.float64(runs[f"{name}, plain"][0]["w"])
            error = np.float64(join(*runs[name])["w"]) - want
            place = 2.0 ** (9 - bits)  # of numbers from 1 to 2, as all of these are
            assert np.all(abs(error) < 5 * np.sqrt(1000) / 2 * place)
            assert abs(error.mean()) < 4 * error.std() / np.sqrt(n)
            assert np.all(abs(want - np.float64(start["w"])) > 0)


SETTINGS = ("enable_x64", "enable_checks", "debug_nans", "check_tracer_leaks", "disable_jit")


@pytest.mark.parametrize("setting", [f"jax_{setting}" for setting in SETTINGS])
def test_strict_settings(setting):
    """With neither dtypes nor ranks promoted; beside float64, with gradients of any dtype."""
    tx = side_by_side({f"{bits}": master_weights(rmsprop(0.1), bits) for bits in BITS})
    settings = {setting: True, "jax_numpy_dtype_promotion": "strict"}
    settings |= {"jax_numpy_rank_promotion": "raise"}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        params = {
            "b": jnp.ones((3, 4), jnp.bfloat16),
            "d": jnp.ones(3, float),
            "s": jnp.bfloat16(2),
        }
        grads = {"b": np.full((3, 4), -2.0), "d": jnp.ones(3, float), "s": np.float16(0)}
        params, grads = (dict.fromkeys(("16", "24", "32"), tree) for tree in (params, grads))
        state = tx.init(params)
        for update in (tx.update, jax.jit(tx.update)):
            updates, new = update(grads, state, params)
            assert jax.tree.map(form, new) == jax.tree.map(form, state)
            for one in updates.values():
                assert one["b"].dtype == one["s"].dtype == jnp.float32
                assert np.all(one["b"] > 0.2)
                assert one["d"].dtype == params["16"]["d"].dtype
                assert one["s"] == 0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def form(leaf):
    return leaf.shape, leaf.dtype, leaf.weak_type


def in_dtype(tree, dtype):
    return jax.tree.map(lambda p: p.astype(dtype), tree)


def rounded(tx):
    """As tx, with updates that a compiler does not add to parameters before it has rounded them."""

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda u: unfused(u, state.count >> 31), updates), state

    return optax.GradientTransformation(tx.init, update)


def in_float32(tx):
    def update(grads, state, params):
        return tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state, params)

    return optax.GradientTransformation(tx.init, update)


def test_the_example_that_bfloat16_cannot_do(subtests):
    """300 steps of gradient .01 at rate 1e-3, from 1: float32 gets to .691."""
    tx, n = rmsprop(1e-3), 4096
    txs = {"float32": tx, "bfloat16": tx} | {f"{bits}": master_weights(tx, bits) for bits in BITS}
    params = dict.fromkeys(txs, jnp.ones(n, jnp.bfloat16)) | {"float32": jnp.ones(n)}
    runs, _ = trained(txs, params, np.full((300, 1), 0.01, np.float32) * np.ones(n, np.float32))
    want = np.float64(runs["float32"][0]).mean()
    assert 0.690 < want < 0.6915
    assert np.all(np.float64(runs["bfloat16"][0]) > 0.99)  # as everyone has it
    for bits, sd in (
        (16, np.sqrt(300 * 1e-3 * 2**-8) / 2),
        (24, np.sqrt(300) * 2**-17),
        (32, 1e-6),
    ):
        with subtests.test(bits=bits):
            got = np.float64(join(*runs[f"{bits}"]))
            assert got.std() < 2 * sd
            assert abs(got.mean() - want) < 4 * sd / np.sqrt(n) + 1e-6
    np.testing.assert_array_equal(join(*runs["32"]), runs["float32"][0])


@pytest.mark.parametrize("bits", [16, 24])
def test_rounding_at_random_has_the_right_mean(bits):
    """Over 2,000 seeds, each place within 4 standard errors, and their mean square near 1.

    They deviate by at most the last places of where the two steps lead, of which the first may be
    the larger number.
    """
    low = {16: -3, 24: -5}[bits]  # smaller ones change too few of them
    rng = np.random.default_rng(bits)  # whichever tests have run before
    steps = np.float32(rng.standard_normal((2, 48)) * 10.0 ** rng.uniform(low, 0, 48))
    start = jnp.asarray(rng.uniform(0.5, 4, 48), jnp.bfloat16)
    seeds = 2000
    # The places of one array are as good as so many seeds.
    x = jnp.broadcast_to(start, (seeds, 48))
    grads = jnp.broadcast_to(steps[:, None], (2, seeds, 48))
    runs, _ = trained({"": master_weights(GIVEN, bits)}, {"": x}, grads)
    params, state = runs[""]
    path = np.float64(start) + np.cumsum(steps.astype(np.float64), axis=0)
    want, got = path[-1], np.float64(join(params, state))
    error = got.std(0) / np.sqrt(seeds)
    z = (got.mean(0) - want) / np.maximum(error, 1e-7)
    assert np.all(abs(z) < 4)
    assert np.mean(z**2) < 2
    unit = 2.0 ** (np.floor(np.log2(abs(path).max(axis=0))) - (7 if bits == 16 else 15))
    assert np.all(got.std(0) <= 2 * unit)
    assert np.mean(error > 0) > 0.9


def test_seeds_leaves_steps_and_slots_have_bits_of_their_own(subtests):
    """Two independent roundings agree as often as two coins."""
    x = {"a": jnp.ones((64, 128), jnp.bfloat16), "b": jnp.ones((64, 128), jnp.bfloat16)}
    half = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-8, jnp.float32), x)

    @jax.jit
    def roundings():
        found = {}
        for seed in (0, 1, -1, 2**40):
            tx = master_weights(GIVEN, 16, seed)
            start = tx.init(x)
            u, _ = tx.update(half, start, x)
            found[f"seed {seed}"] = u["a"] > 0
        tx = master_weights(GIVEN, 16)
        start = tx.init(x)
        found["leaf"] = tx.update(half, start, x)[0]["b"] > 0
        later = start._replace(count=start.count + 1)
        found["step"] = tx.update(half, later, x)[0]["a"] > 0
        fine = jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-16, jnp.float32), x)
        tx = master_weights(GIVEN, 24, 5)
        found["24 bits"] = tx.update(fine, tx.init(x), x)[1].corrections["a"] > 0
        # A second moment of bfloat16, of the same seed, leaf and step: 1 + 2^-8.
        held = rmsprop(0.1, decay=0.0, momentum=0.0, storage=low_memory.bfloat16())
        root = jnp.full((64, 128), np.sqrt(1 + 2.0**-8), jnp.float32)
        state = held.update({"a": root, "b": root}, held.init(x))[1]
        found["second moment"] = state.nu["a"] > 1
        return found

    ups = jax.device_get(roundings())
    for one, other in itertools.combinations(ups, 2):
        with subtests.test(one=one, other=other):
            a, b = (np.mean(ups[name]) for name in (one, other))
            assert 0.4 < a < 0.6
            agree = np.mean(ups[one] == ups[other])
            np.testing.assert_allclose(agree, a * b + (1 - a) * (1 - b), atol=4 * 0.5 / 8192**0.5)


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_update_changes_nothing(bits):
    params = narrow(RNG.standard_normal((16, 64)))
    tx = master_weights(GIVEN, bits)
    u, state = tx.update(jnp.float32(RNG.standard_normal((16, 64))), tx.init(params), params)
    params = optax.apply_updates(params, u)
    for _ in range(20):
        u, new = tx.update(jnp.zeros((16, 64), jnp.bfloat16), state, params)
        assert not np.any(u)
        assert_same(new._replace(count=state.count), state)
        state = new


@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_stays_in_its_place(bits):
    """It is not hidden, and it does not enter the correction."""
    tx, params = master_weights(GIVEN, bits), narrow(RNG.standard_normal(64))
    u, state = tx.update(jnp.float32(RNG.standard_normal(64) / 9), tx.init(params), params)
    params = optax.apply_updates(params, u)
    bad = np.float32(RNG.standard_normal(64) / 9)
    bad[:3] = np.nan, np.inf, -np.inf
    u, new = tx.update(bad, state, params)
    want, good = tx.update(np.where(np.isfinite(bad), bad, 0), state, params)
    np.testing.assert_array_equal(u[:3], bad[:3])
    np.testing.assert_array_equal(u[3:], want[3:])
    assert_same(new, good)
    # Whoever sets the parameters back has their weights back.
    broken = optax.apply_updates(params, u)
    weights = join(broken, new)
    np.testing.assert_array_equal(weights[:3], bad[:3])
    u, after = tx.update(np.zeros(64, np.float32), new, broken)
    assert np.all(~np.isfinite(u[:3]))
    assert np.all(np.isfinite(u[3:]))
    np.testing.assert_array_equal(
        join(params.at[3:].set(broken[3:]), after)[:3], join(params, state)[:3]
    )


@pytest.mark.parametrize("bits", BITS)
def test_parameters_changed_from_outside_are_the_truth(bits):
    """Clipped, doubled, set to zero: the weight is parameter and correction."""
    tx, params = master_weights(GIVEN, bits), narrow(RNG.uniform(1, 1.9, 64))
    u, state = tx.update(jnp.float32(RNG.uniform(0, 0.02, 64)), tx.init(params), params)
    params = optax.apply_updates(params, u)
    rest = np.float64(join(params, state)) - np.float64(params)
    doubled = join(2 * params, state)  # whose last place is twice as large
    np.testing.assert_array_equal(np.float64(doubled), 2 * np.float64(params) + 2 * rest)
    moved = optax.apply_updates(2 * params, tx.update(jnp.ones(64), state, 2 * params)[0])
    assert np.all(abs(np.float64(moved) - np.float64(doubled) - 1) <= 2.0**-6)


def numbers_held(txs, params):
    return {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves((params[name], tx.init(params[name]))))
        / params[name].size
        for name, tx in txs.items()
    }


def test_bytes_a_parameter(subtests):
    """Of parameters and state, by what is held and by what a donated step aliases."""
    q8 = low_memory.q8()
    cases = {
        "float32": (rmsprop(1e-3), jnp.float32, 8.0),
        "float32, momentum": (rmsprop(1e-3, momentum=0.9), jnp.float32, 12.0),
        "24": (master_weights(rmsprop(1e-3, storage=q8)), jnp.bfloat16, 4.0),
        "16": (master_weights(rmsprop(1e-3, storage=q8), 16), jnp.bfloat16, 3.0),
        "32": (master_weights(rmsprop(1e-3, storage=q8), 32), jnp.bfloat16, 5.0),
        "24, momentum": (
            master_weights(rmsprop(1e-3, momentum=0.9, storage=q8)),
            jnp.bfloat16,
            5.0,
        ),
        "16, momentum": (
            master_weights(rmsprop(1e-3, momentum=0.9, storage=q8), 16),
            jnp.bfloat16,
            4.0,
        ),
    }
    for name, (tx, dtype, want) in cases.items():
        with subtests.test(name=name):
            params = jnp.ones((256, 1024), dtype)
            carry = params, tx.init(params)

            def step(carry, grads, tx=tx):
                updates, state = tx.update(grads, carry[1], carry[0])
                return optax.apply_updates(carry[0], updates), state

            program = jax.jit(step, donate_argnums=0).lower(carry, params).compile()
            memory = program.memory_analysis()
            held = sum(leaf.nbytes for leaf in jax.tree.leaves(carry))
            assert want <= held / params.size < want + 0.02
            assert memory.alias_size_in_bytes >= held - 64
            if name == "16":  # XLA:CPU keeps nothing more than without master weights
                plain = jax.jit(
                    functools.partial(step, tx=rmsprop(1e-3, storage=q8)), donate_argnums=0
                )
                inner = (params, carry[1].inner_state)
                inner = plain.lower(inner, params).compile().memory_analysis()
                assert memory.temp_size_in_bytes <= inner.temp_size_in_bytes + 1024

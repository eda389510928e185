"""The bits of stochastic rounding: identical in every program, and otherwise as good as random."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._storage import Draw, Joined, slots_of, slots_to_step, with_slots
from rmsprop_jax.low_memory._random import random_bits
from small_states import FORMS, after


def test_the_same_bits_eagerly_compiled_and_in_a_loop(subtests):
    """Of the state, and of updates that are what is stored of momentum.

    Other updates may be rounded in another order in another program.
    """
    params = {"a": jnp.ones(()), "b": {"c": jnp.ones((33, 256))}}
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: np.float32(rng.standard_normal((6, *p.shape))), params)
    cases = list(itertools.product((low_memory.q8(seed=7), low_memory.bfloat16(seed=7)), FORMS))
    txs = [rmsprop(0.1, **form, storage=storage) for storage, form in cases]

    def step(g, states):
        return [tx.update(g, state, params) for tx, state in zip(txs, states, strict=True)]

    def loop(step):
        states = [tx.init(params) for tx in txs]
        for t in range(6):
            both = step(jax.tree.map(lambda g, t=t: g[t], grads), states)
            states = [state for _, state in both]
        updates = [stored(form, u) for (_, form), (u, _) in zip(cases, both, strict=True)]
        return list(zip(updates, states, strict=True))

    def stored(form, updates):
        same = "momentum" in form and not {"nesterov", "cautious"} & set(form)
        return updates["b"]["c"] if same else None

    def scan():
        runs = after(lambda: txs, grads, params)
        return [
            (stored(form, jax.tree.map(lambda u: u[-1], updates)), state)
            for (_, form), (updates, state) in zip(cases, runs, strict=True)
        ]

    want = loop(jax.jit(step))
    assert sum(updates is not None for updates, _ in want) == 2
    for _, state in want:
        assert len(np.unique(jax.tree.leaves(state.nu)[1])) > 8  # of leaf "c": something happened
    for how, run in (("eager", loop(step)), ("loop", scan())):
        for (storage, form), got, one in zip(cases, run, want, strict=True):
            with subtests.test(how=how, storage=storage, form=form):
                jax.tree.map(np.testing.assert_array_equal, got, one)


@pytest.mark.parametrize("storage", [low_memory.q8(min_size=0), low_memory.bfloat16()], ids=str)
def test_an_average_is_rounded_after_each_operation(storage):
    """Whatever is fused with what: no product is contracted with the sum that follows.

    In bfloat16 what is stored is also what is used: one of the neighbours of the sum.
    """
    grads = np.random.default_rng(0).standard_normal((3, 64, 128)).astype(np.float32)
    decay = np.float32(0.9)

    @jax.jit
    def advance(field, g, step):
        slot = slots_to_step(field)
        draw = Draw(step, jnp.uint32(1), 0, lambda: 0 * g)
        with jax.numpy_dtype_promotion("standard"):
            term = (1 - decay) * (g * g)
            value, new = storage.accumulate(slot, decay, lambda: term, draw=draw)
        return value(0), with_slots(field, new)

    field = storage.join(storage.init(grads[0], 0.0, field="nu", path=""), field="nu")
    for t, g in enumerate(grads):
        old, (got, field) = field, advance(field, g, np.int32(t))
    scale = np.float32(1)
    if isinstance(old, Joined):
        scale = np.asarray(old.scales)[0]
        old = slots_of(old._replace(scales=np.ones(1, np.float32))).decode()
    past = (decay * scale) * np.asarray(old, np.float32)
    want = past + (1 - decay) * (grads[-1] * grads[-1])
    if storage.joins:
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_array_equal(got, np.asarray(field, np.float32))
        below = want.view(np.int32) & ~0xFFFF
        assert np.all((np.asarray(got).view(np.int32) - below) % (1 << 16) == 0)
        up = (np.asarray(got).view(np.int32) - below) >> 16
        assert set(np.unique(up)) == {0, 1}


def test_seed_leaf_step_and_slot_change_the_bits(subtests):
    """Two independent roundings agree as often as two coins that fall up as often as they do."""
    seeds = (0, 1, -1, 2**40, 0)
    g = jnp.full((64, 128), 0.7)
    params = {"a": g, "b": g}

    @jax.jit
    def slots():
        found = {}
        for i, seed in enumerate(seeds):
            tx = rmsprop(0.1, 0.9, momentum=0.9, storage=low_memory.q8(seed=seed))
            start = tx.init(params)
            _, state = tx.update(params, start)
            found[f"seed {seed}" + " again" * (i == 4)] = state.nu.codes["a"]
        found["leaf"] = state.nu.codes["b"]
        found["slot"] = state.trace.codes["a"]
        _, state = tx.update(params, start._replace(count=start.count + 1))
        found["step"] = state.nu.codes["a"]
        return found

    ups = {name: np.asarray(codes) == np.max(codes) for name, codes in slots().items()}
    np.testing.assert_array_equal(ups.pop("seed 0 again"), ups["seed 0"])
    for one, other in itertools.combinations(ups, 2):
        with subtests.test(one=one, other=other):
            a, b = (np.mean(ups[name]) for name in (one, other))
            assert 0.1 < a < 0.99
            assert 0.1 < b < 0.99
            agree = np.mean(ups[one] == ups[other])
            want = a * b + (1 - a) * (1 - b)
            np.testing.assert_allclose(agree, want, atol=4 * 0.5 / 8192**0.5)


words_of = jax.jit(lambda key, like: random_bits(key, like, 20))


def words(key, n):
    return np.asarray(words_of(np.uint32(key), jnp.zeros(n))).astype(np.int64)


def test_the_hash_is_uniform_over_places(subtests):
    """chi^2 within 5 of its standard deviations, for the upper, middle and lower bits."""
    n = 1 << 18
    for key in (0, 1, 0xDEADBEEF, 2**32 - 1):
        x = words(key, n)
        for shift in (12, 6, 0):
            with subtests.test(key=key, shift=shift):
                counts = np.bincount(x >> shift & 255, minlength=256)
                chi2 = np.sum((counts - n / 256) ** 2) / (n / 256)
                assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def test_the_hash_does_not_correlate_over_places_steps_or_keys(subtests):
    """Within 5 standard errors, for the numbers and their upper four bits, each with each."""
    n = 1 << 16
    x = words(12345, n + 4096)
    lags = (1, 2, 3, 7, 64, 128, 1000, 1024, 4096)
    others = {f"{lag} places on": x[lag : lag + n] for lag in lags}
    others |= {f"bit {bit} of the key": words(12345 ^ 1 << bit, n) for bit in range(32)}

    def parts(words):
        return [words, *(words >> bit & 1 for bit in range(16, 20))]

    for name, other in others.items():
        with subtests.test(name):
            correlations = np.corrcoef(parts(x[:n]), parts(other))[:5, 5:]
            assert np.all(abs(correlations) < 5 / math.sqrt(n))


def test_the_hash_over_steps_is_uniform_in_one_place():
    """The sequence that one number sees: its mean, spread and correlation from step to step."""
    tx = rmsprop(0.1, 0.5, storage=low_memory.q8(min_size=0))
    g = np.full((1000, 8), np.sqrt(np.float32(1.5)))
    start = tx.init(g[0])

    def step(state, g):
        # Half way between powers of two, and forgotten at each step: up or down at random.
        _, state = tx.update(g * jnp.sqrt(2.0), state._replace(nu=start.nu))
        return state, state.nu.codes

    _, codes = jax.lax.scan(step, start, g)
    up = np.asarray(codes, np.int64) - int(codes.min())
    assert set(np.unique(up)) == {0, 1}
    assert np.all(abs(up.mean(axis=0) - 0.5) < 5 * 0.5 / math.sqrt(1000))
    for place in up.T:
        assert abs(np.corrcoef(place[1:], place[:-1])[0, 1]) < 5 / math.sqrt(999)


def test_leaves_of_the_same_name_draw_their_own_bits():
    """Both "a/b": one by its key, the other by its place."""
    x = jnp.ones((8, 512))
    names = {"a/b": x, "a": {"b": x, "": {"": x}}, "a/b/": x}
    tx = rmsprop(0.1, decay=0.999, storage=low_memory.bfloat16())
    _, state = tx.update(names, tx.init(names))
    drawn = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(state.nu)]
    for a, b in itertools.combinations(drawn, 2):
        assert 0.1 < np.mean(a != b) < 0.9

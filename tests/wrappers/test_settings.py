"""JAX's strictest settings, in each storage; strict promotion is on in all tests."""

import contextlib

import jax
from jax.experimental import checkify
import numpy as np
import optax
import pytest

from helpers import assert_moved, side_by_side
from rmsprop_jax import rmsprop
from storages import FULL, SMALL, types

FORMS = [
    {},
    {"eps_in_sqrt": False, "weight_decay": 0.1},
    {"centered": True, "momentum": 0.9},
    {"bias_correction": True, "momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "cautious": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
]
SCHEDULE = optax.cosine_decay_schedule(0.1, 10)  # which mixes dtypes
TXS = {f"float32 {form}": rmsprop(SCHEDULE, **form) for form in FORMS}
TXS |= {name: rmsprop(SCHEDULE, **FULL, storage=storage) for name, storage in SMALL.items()}
GRADS = {
    "half": np.tile(np.float16([0, 1, -300, 7]), 8),
    "single": np.tile(np.float32([[0, 1e-30], [1e30, 1]]), 8),
    "complex": np.tile(np.complex64([0, 1j, 1, 2]), 8),
    "scalar": np.float32(-3),
}
PARAMS = jax.tree.map(np.ones_like, GRADS)


@contextlib.contextmanager
def setting_of(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "setting",
    [
        None,  # but strict promotion
        "jax_check_tracer_leaks",
        "jax_enable_checks",
        "jax_debug_nans",
        "jax_debug_infs",
        "jax_enable_x64",
        "jax_disable_jit",
    ],
)
def test_strict_settings(setting, jit, subtests):
    """Zeros among the gradients, float16 beside complex64."""

    tx, params, grads = side_by_side(TXS), dict.fromkeys(TXS, PARAMS), dict.fromkeys(TXS, GRADS)
    update = jax.jit(tx.update) if jit else tx.update
    with setting_of(setting, True) if setting else contextlib.nullcontext():
        states = tx.init(params)
        for _ in range(3):
            before = types(states)
            updates, states = update(grads, states, params)
            assert types(states) == before
        assert_moved(states)
        for name in TXS:
            with subtests.test(tx=name):
                for leaf, u in updates[name].items():
                    assert u.dtype == PARAMS[leaf].dtype
                    assert np.all(np.isfinite(u))
                    assert np.any(u != 0)


def test_checkify_with_checks_of_what_is_traced(subtests):
    """It finds nothing in an update, nor in its derivative. Running it takes long to compile.

    Small state is traced without JAX's own checks: with them checkify fails on every custom_jvp, by
    an assertion of JAX's about the names of its arguments.
    """
    grads = {"single": np.full(33, 1e-3, np.float32)}  # traced nowhere else, so checked here

    for name, tx in TXS.items():
        strict = not any(small in name for small in SMALL)

        def checked(f, *args, strict=strict):
            with setting_of("jax_enable_checks", strict):
                return checkify.checkify(f, errors=checkify.all_checks)(*args)

        def update(g, state, tx=tx):
            return tx.update(g, state, grads)

        def total(g, state, update=update):
            return update(g, state)[0]["single"].sum()

        state = tx.init(grads)
        for f in (update, jax.grad(total)):
            with subtests.test(tx=name, f=f.__name__):
                jax.eval_shape(lambda g, state, f=f: checked(f, g, state), grads, state)
        if "bias_correction" in name or name == "bfloat16":
            error, _ = checked(update, grads, state)
            error.throw()


@pytest.mark.parametrize(
    "number",
    [-3.0, 1 + 2j, np.float16(2), np.float64(2), np.asarray(2.0), np.full((2, 32), 1j)],
    ids=lambda number: f"{type(number).__name__}{np.shape(number)}",
)
def test_numbers_and_numpy_arrays_are_as_with_jit_where_it_is_disabled(number, subtests):
    for name, tx in TXS.items():
        with subtests.test(tx=name):
            want = tx.update(number, tx.init(number), number)
            with jax.disable_jit():
                got = tx.update(number, tx.init(number), number)
            assert types(got) == types(want)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), got, want)


def test_under_default_promotion(default_promotion):
    """And it stays what it was."""
    for tx in TXS.values():
        jax.eval_shape(tx.update, GRADS, jax.eval_shape(tx.init, PARAMS), PARAMS)
    assert jax.config.jax_numpy_dtype_promotion == "standard"
    assert jax.config.jax_numpy_rank_promotion == "allow"

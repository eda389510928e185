"""Which leaves are stored in how many bits, and how much memory they take."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import assert_moved
from rmsprop_jax import low_memory, rmsprop
from rmsprop_jax._storage import is_packed, slots_of
from small_states import FORMS, STORAGES, after, fields, last, row, table
from storages import types


def assert_near_float32(shapes, dtypes, form):
    """Two steps of leaves of some shapes and dtypes; shapes and types of the state stay.

    Where momentum is centered, its first step is rounded to a power of two.
    """
    rng = np.random.default_rng(sum(map(math.prod, shapes)))
    x = [np.ones(shape, dtype) for shape, (dtype, _) in zip(shapes, dtypes, strict=True)]
    grads = [
        rng.uniform(0.5, 2, (2, *shape)).astype(dtype)
        for shape, (_, dtype) in zip(shapes, dtypes, strict=True)
    ]
    txs = [
        rmsprop(0.1, eps=1e-2, **form, storage=storage)
        for storage in (low_memory.q8(min_size=0), None)
    ]
    (updates, state), (wanted, _) = after(lambda: txs, grads, x)
    assert types(state) == types(jax.eval_shape(txs[0].init, x))
    centered = form.get("centered", False)
    for leaf, (shape, (_, dtype)) in enumerate(zip(shapes, dtypes, strict=True)):
        got, want = (np.asarray(tree[leaf])[-1] for tree in (updates, wanted))
        assert got.dtype == dtype
        assert state.nu.codes[leaf].shape == shape
        assert np.all(abs(want) > 0.05)
        np.testing.assert_allclose(
            np.float32(got), np.float32(want), rtol=1 if centered else 0.45, atol=0.02
        )


DTYPES = [jnp.dtype(dtype) for dtype in (jnp.float16, jnp.bfloat16, jnp.float32)]
PAIRS = list(itertools.product(DTYPES, repeat=2))  # of the parameters and of their gradients


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=2),
    st.one_of(st.integers(1, 700), st.sampled_from([1, 2, 127, 131, 251, 997, 1024, 4099])),
    st.sampled_from(PAIRS),
    st.sampled_from(FORMS),
)
def test_any_shape(lead, n, dtypes, form):
    assert_near_float32([(*lead, n)], [dtypes], form)


SHAPES = [(1,), (2, 9), (131,), (4099,), (3, 2, 48), (2, 1, 127), (5, 64), (384,), (7, 3), (700,)]


def test_some_shapes(subtests):
    """All above and all dtypes of them, two for each form."""
    for i, form in enumerate(FORMS):
        with subtests.test(form=form):
            pairs = (PAIRS[i], PAIRS[(i + 5) % 9])
            assert_near_float32(SHAPES[i::5], pairs, form)


def test_small_leaves_beside_a_long_one(subtests):
    """Each with its own scale and bits, as if it were alone."""
    rng = np.random.default_rng(0)
    shapes = {"few": (2, 4), "more": (3, 10), "long": (10007,)}
    grads = {name: np.float32(rng.standard_normal((2, *shape))) for name, shape in shapes.items()}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def make():
        return [rmsprop(0.1, momentum=0.9, storage=low_memory.q8(min_size=0))]

    (state,) = last(make, grads, params)
    assert_moved(state)
    for name in ("few", "long"):
        with subtests.test(leaf=name):
            (alone,) = last(make, {name: grads[name]}, {name: params[name]})
            for field, one in zip(fields(state), fields(alone), strict=True):
                np.testing.assert_array_equal(field.codes[name], one.codes[name])
                np.testing.assert_array_equal(
                    field.scales[sorted(params).index(name)], one.scales[0]
                )


def test_which_leaves_are_held_in_8_bits():
    params = {
        "scalar": np.ones((), np.float32),
        "small": np.ones(4095, np.float32),
        "large": np.ones((8, 512), np.float32),
        "prime": np.ones((2, 2053), np.float32),
        "empty": np.ones((0, 128), np.float32),
        "complex": np.ones(4096, np.complex64),
        "embedding": {"table": np.ones((64, 64), np.float32)},
    }
    storage = low_memory.q8(exempt=lambda path: path.startswith("embedding/"))
    tx = rmsprop(0.1, centered=True, momentum=0.9, storage=storage)
    state = jax.eval_shape(tx.init, params)
    for name in params:
        for field, dtype in (("nu", jnp.uint8), ("mu", jnp.bfloat16), ("trace", jnp.int8)):
            slot = slots_of(getattr(state, field))[name]
            (held,) = jax.tree.leaves(slot, is_leaf=is_packed)
            eight = name in ("large", "prime")
            assert is_packed(held) == (eight and field != "mu"), (name, field)
            if eight:
                assert (held.codes if is_packed(held) else held).dtype == dtype
            else:
                wide = field != "nu" and name == "complex"
                assert held.dtype == (jnp.complex64 if wide else jnp.float32)


def test_what_is_beside_the_codes_of_each_leaf():
    params = {"large": jnp.ones((8, 512)), "small": jnp.ones(4095), "prime": jnp.ones((2, 2053))}
    tx = rmsprop(0.1, momentum=0.9, storage=low_memory.q8())
    state = tx.init(params)
    for field in (state.nu, state.trace):
        assert types(field.scales) == ((3,), jnp.float32, False)
        np.testing.assert_array_equal(field.scales, 0)  # nothing is held yet
    _, state = tx.update(params, state)
    _, state = tx.update(params, state)
    for field in (state.nu, state.trace):
        large, prime, small = np.asarray(field.scales)
        assert large > 0
        assert prime > 0
        assert np.isfinite(small)  # of no meaning


def test_an_exempt_leaf_is_held_in_float32_and_moves_as_there():
    """The second moment bit for bit; a step that is masked before it is added is rounded, too."""

    def make():
        storages = (low_memory.q8(exempt=lambda path: True), None)
        return [rmsprop(0.1, momentum=0.9, storage=storage) for storage in storages]

    (got, state), (want, plain) = after(make, row(5), table(64))
    assert_moved(plain)
    np.testing.assert_array_equal(state.nu.codes, plain.nu)
    assert state.trace.codes.dtype == jnp.float32
    for a, b in ((got, want), (state.trace.codes, plain.trace)):
        np.testing.assert_allclose(a, b, rtol=0, atol=5 * 2.0**-24)  # five steps of up to 1


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_float64_parameters_are_held_in_as_few_bits(storage):
    with jax.enable_x64(True):
        x = np.ones((64, 128))
        tx = rmsprop(0.1, momentum=0.9, storage=storage)
        ((updates, state),) = after(lambda: [tx], 2 * x[None], x)
        assert updates.dtype == jnp.float64
        want = -0.1 * 2 / np.sqrt(0.1 * 4)
        np.testing.assert_allclose(updates[0], want, rtol=1 / 8)  # of momentum in 8 bits
        np.testing.assert_allclose(updates[0].mean(), want, rtol=0.01)
        assert sum(a.nbytes for a in jax.tree.leaves((state.nu, state.trace))) < 4.1 * x.size


def compiled_step(tx, shape):
    def step(x, state, g):
        updates, state = tx.update(g, state, x)
        return optax.apply_updates(x, updates), state

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    args = x, jax.eval_shape(tx.init, x), x
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


TRACED = {
    "plain": {},
    "eps outside": {"eps_in_sqrt": False},
    "bias correction": {"bias_correction": True},
    "coupled": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True, "momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "cautious": {"momentum": 0.9, "cautious": True},
    "nesterov, cautious": {"momentum": 0.9, "nesterov": True, "cautious": True},
}


def test_bytes_a_parameter(subtests):
    """Of the state, and of what a compiled step with donated buffers needs beside.

    In 8 bits XLA:CPU makes a copy of the second moments' codes.
    """
    shape = (1024, 2048)
    size = math.prod(shape)
    for name, form in TRACED.items():
        for storage, tx in {
            s: rmsprop(1e-3, **form, storage=STORAGES[s]) for s in STORAGES
        }.items():
            with subtests.test(form=name, storage=storage):
                state = jax.eval_shape(tx.init, jnp.ones(shape))
                held = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
                slots = 1 + ("momentum" in form) + 2 * ("centered" in form)
                if storage == "bfloat16":
                    slots = 2 * (1 + ("momentum" in form) + ("centered" in form))
                assert slots <= held / size < slots + 1e-4
                memory = compiled_step(tx, shape).memory_analysis()
                most = 1.1 if storage == "q8" else 0.1
                assert memory.temp_size_in_bytes < most * size

"""Which leaves are held in how many bits, in which blocks, and with what memory."""

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
from rmsprop_jax.low_memory._blocks import block_of
from small_states import FORMS, STORAGES, after, fields, last, row, table
from storages import types


@pytest.mark.parametrize(
    ("n", "block", "length"),
    [
        (1024, 128, 128),
        (768, 128, 96),
        (512, 128, 64),
        (384, 128, 96),
        (300, 128, 75),
        (128, 128, 64),
        (10, 128, 10),
        (1, 128, 1),
        (127, 128, 127),
        (131, 128, 131),
        (1_000_003, 128, 1_000_003),
        (262, 128, 131),
        (3721, 128, 3721),
        (1024, 256, 128),
        (1024, 1, 1),
        (1024, 10**9, 1024),
        (7, 3, 7),
    ],
)
def test_the_length_of_blocks(n, block, length):
    assert block_of(n, block) == length


def assert_near_float32(shapes, dtypes, form, block):
    """Two steps of leaves of some shapes and dtypes; shapes and types of the state stay."""
    rng = np.random.default_rng(sum(map(math.prod, shapes)))
    x = [np.ones(shape, dtype) for shape, (dtype, _) in zip(shapes, dtypes, strict=True)]
    grads = [
        rng.uniform(0.5, 2, (2, *shape)).astype(dtype)
        for shape, (_, dtype) in zip(shapes, dtypes, strict=True)
    ]
    txs = [
        rmsprop(0.1, eps=1e-2, **form, storage=storage)
        for storage in (low_memory.q8(block=block, min_size=0), None)
    ]
    (updates, state), (wanted, _) = after(lambda: txs, grads, x)
    assert types(state) == types(jax.eval_shape(txs[0].init, x))
    for leaf, (shape, (_, dtype)) in enumerate(zip(shapes, dtypes, strict=True)):
        *lead, n = shape
        got, want = (np.asarray(tree[leaf])[-1] for tree in (updates, wanted))
        assert got.dtype == dtype
        assert state.nu.codes[leaf].shape == shape
        assert state.nu.exponents[leaf].shape == (*lead, n // block_of(n, block))
        assert np.all(abs(want) > 0.05)
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=0.2, atol=0.02)


DTYPES = [jnp.dtype(dtype) for dtype in (jnp.float16, jnp.bfloat16, jnp.float32)]
PAIRS = list(itertools.product(DTYPES, repeat=2))  # of the parameters and of their gradients


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=2),
    st.one_of(st.integers(1, 700), st.sampled_from([1, 2, 127, 131, 251, 997, 1024, 4099])),
    st.sampled_from(PAIRS),
    st.sampled_from(FORMS),
    st.sampled_from([1, 3, 16, 128]),
)
def test_any_shape(lead, n, dtypes, form, block):
    assert_near_float32([(*lead, n)], [dtypes], form, block)


SHAPES = [(1,), (2, 9), (131,), (4099,), (3, 2, 48), (2, 1, 127), (5, 64), (384,), (7, 3), (700,)]


def test_some_shapes(subtests):
    """All above and all dtypes of them, two for each form."""
    for i, (form, block) in enumerate(zip(FORMS, (128, 16, 3, 1, 128), strict=True)):
        with subtests.test(form=form, block=block):
            pairs = (PAIRS[i], PAIRS[(i + 5) % 9])
            assert_near_float32(SHAPES[i::5], pairs, form, block)


def test_small_leaves_and_one_of_one_long_block(subtests):
    """Each with its own scale and bits, as if it were alone."""
    rng = np.random.default_rng(0)
    shapes = {"few": (2, 4), "more": (3, 10), "long": (10007,)}
    grads = {name: np.float32(rng.standard_normal((2, *shape))) for name, shape in shapes.items()}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def make():
        return [rmsprop(0.1, momentum=0.9, storage=low_memory.q8(min_size=0))]

    (state,) = last(make, grads, params)
    assert_moved(state)
    assert state.nu.exponents["long"].shape == (1,)
    for name in ("few", "long"):
        with subtests.test(leaf=name):
            (alone,) = last(make, {name: grads[name]}, {name: params[name]})
            for field, one in zip(fields(state), fields(alone), strict=True):
                np.testing.assert_array_equal(field.codes[name], one.codes[name])
                np.testing.assert_array_equal(field.exponents[name], one.exponents[name])
                np.testing.assert_array_equal(field.scales, one.scales[0])


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
    state = rmsprop(0.1, momentum=0.9, storage=low_memory.q8()).init(params)
    for field in (state.nu, state.trace):
        assert types(field.exponents) == {
            "large": ((8, 8), jnp.uint8, False),
            "small": ((4095,), jnp.uint8, False),
            "prime": ((2, 1), jnp.uint8, False),
        }
        assert not np.any(field.exponents["small"])
        assert types(field.scales) == ((3,), jnp.float32, False)


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
        np.testing.assert_allclose(updates[0], -0.1 * 2 / np.sqrt(0.1 * 4), rtol=1e-6)
        assert sum(a.nbytes for a in jax.tree.leaves((state.nu, state.trace))) < 4.1 * x.size


def compiled_step(tx, shape):
    def step(x, state, g):
        updates, state = tx.update(g, state, x)
        return optax.apply_updates(x, updates), state

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    args = x, jax.eval_shape(tx.init, x), x
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


@pytest.mark.parametrize(
    ("form", "state_bytes", "temporary"),
    [
        ({}, 1.0079, 1.1),
        ({"eps_in_sqrt": False}, 1.0079, 1.1),
        ({"bias_correction": True}, 1.0079, 1.1),
        ({"weight_decay": 0.1, "decoupled_weight_decay": True}, 1.0079, 1.1),
        ({"centered": True}, 3.0079, 3.1),
        ({"momentum": 0.9}, 2.0158, 6.1),
        ({"weight_decay": 0.1}, 1.0079, 5.1),
    ],
    ids=str,
)
def test_bytes_a_parameter(form, state_bytes, temporary):
    """Of the state, and of what a compiled step with donated buffers needs besides."""
    shape = (1024, 1024)
    tx = rmsprop(1e-3, **form, storage=low_memory.q8())
    state = jax.eval_shape(tx.init, jnp.ones(shape))
    size = math.prod(shape)
    assert sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state)) < (
        state_bytes * size
    )
    memory = compiled_step(tx, shape).memory_analysis()
    assert memory.temp_size_in_bytes < temporary * size


def test_bytes_of_bfloat16():
    shape = (1024, 1024)
    tx = rmsprop(1e-3, momentum=0.9, centered=True, storage=low_memory.bfloat16())
    state = jax.eval_shape(tx.init, jnp.ones(shape))
    assert {field.dtype for field in fields(state)} == {jnp.dtype(jnp.bfloat16)}
    plain = rmsprop(1e-3, storage=low_memory.bfloat16())
    assert compiled_step(plain, shape).memory_analysis().temp_size_in_bytes < 2.1 * 2**20

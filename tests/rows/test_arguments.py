"""Which indices are accepted, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import dialects, low_memory, rmsprop, rows

N = 5
TX = rmsprop(0.1, momentum=0.5)
TABLE = jnp.ones((N, 2))
STATE = rows.init(TX, TABLE)
ONES = jnp.ones((3, 2))


def after(indices, grads=ONES, *, jit=False):
    update = jax.jit(rows.update, static_argnums=0) if jit else rows.update
    return update(TX, indices, grads, TABLE, STATE)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_indices_are_of_any_integer_dtype(dtype, subtests):
    with jax.enable_x64("64" in dtype):
        for jit in (False, True):
            with subtests.test(jit=jit):
                table, state = after(np.array([4, 0, 4], dtype), jit=jit)
                np.testing.assert_array_equal(state.steps, [1, 0, 0, 0, 1])
                np.testing.assert_allclose(state.inner.nu[:, 0], [0.1, 0, 0, 0, 0.4], rtol=1e-6)
                np.testing.assert_array_equal(table[1:4], 1)


def test_a_table_longer_than_the_dtype_of_its_indices():
    table = jnp.ones((300, 1))
    state = rows.init(TX, table)
    for jit in (False, True):
        update = jax.jit(rows.update, static_argnums=0) if jit else rows.update
        _, found = update(TX, np.array([255, 0], np.uint8), jnp.ones((2, 1)), table, state)
        assert np.flatnonzero(found.steps).tolist() == [0, 255]


def test_the_number_of_rows_is_no_row(subtests):
    for jit in (False, True):
        with subtests.test(jit=jit):
            table, state = after(jnp.array([1, N, N]), jit=jit)
            np.testing.assert_array_equal(state.steps, [0, 1, 0, 0, 0])
            np.testing.assert_array_equal(table[0], 1)


@pytest.mark.parametrize("index", [-1, N + 1, np.iinfo(np.int32).max, np.iinfo(np.int32).min])
def test_what_is_no_index_is_an_error_where_it_is_known_and_dropped_in_jit(index, subtests):
    indices = jnp.array([1, index, 2])
    message = rf"^indices must be from 0 to 4, or 5 for no row, got {index} at \[1\]$"
    with subtests.test("known"):
        for call in (lambda: after(indices), lambda: rows.advance(TX, indices, TABLE, STATE)):
            with pytest.raises(ValueError, match=message):
                call()
    with subtests.test("traced"):
        table, state = after(indices, jit=True)
        np.testing.assert_array_equal(state.steps, [0, 1, 1, 0, 0])
        np.testing.assert_array_equal(table[0], 1)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_batch_is_a_step_of_its_own(shape):
    indices, grads = jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, 2))
    table, state = after(indices, grads)
    np.testing.assert_array_equal(table, TABLE)
    assert state.inner.count == 1
    table, _ = rows.advance(TX, indices, table, state)
    np.testing.assert_array_equal(table, TABLE)


def test_indices_of_any_shape_are_those_in_one_row():
    indices, grads = jnp.array([[0, 1], [1, 3]]), jnp.arange(8.0).reshape(2, 2, 2)
    a, b = after(indices, grads), after(indices.ravel(), grads.reshape(4, 2))
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)
    whole, _ = after(jnp.array(3), jnp.ones(2))  # one index alone
    assert np.flatnonzero(whole[:, 0] != 1).tolist() == [3]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients_are_added_in_the_precision_of_the_table(dtype):
    """256 + 1, which bfloat16 has not, and 2048 + 1, which float16 has not."""
    large = {"float16": 2048, "bfloat16": 256, "float32": 2**20}[dtype]
    grads = jnp.asarray([[large], [1]], dtype)
    table = jnp.ones((2, 1))
    _, state = rows.update(TX, jnp.array([1, 1]), grads, table, rows.init(TX, table))
    np.testing.assert_allclose(state.inner.nu[1, 0], 0.1 * (large + 1.0) ** 2, rtol=1e-6)


def test_a_lazy_row_takes_its_own_steps_alone():
    """As a dense table of one row, with the gradients that were its own."""
    rng = np.random.default_rng(0)
    tx = dialects.tensorflow_v1(0.1, momentum=0.9, centered=True)
    table = jnp.asarray(rng.standard_normal((N, 2)), jnp.float32)
    state = rows.init(tx, table, lazy=True)
    assert state.steps is None
    alone = [(table[i], tx.init(table[i])) for i in range(N)]
    for _ in range(12):
        at = rng.choice(N, 2, replace=False)
        grads = jnp.asarray(rng.standard_normal((2, 2)), jnp.float32)
        table, state = rows.update(tx, at, grads, table, state)
        for i, g in zip(at, grads, strict=True):
            x, s = alone[i]
            u, s = tx.update(g, s, x)
            alone[i] = optax.apply_updates(x, u), s
    for i, (x, s) in enumerate(alone):
        np.testing.assert_allclose(table[i], x, rtol=1e-6)
        np.testing.assert_allclose(state.inner.trace[i], s.trace, rtol=1e-6)


def slow(count):
    return 0.5 + 0 * count


ALONE = "with nothing around it"
REFUSED = {
    "storage must be None for single rows, got q8": rmsprop(0.1, storage=low_memory.q8()),
    "storage must be None for single rows, got bf": rmsprop(0.1, storage=low_memory.bfloat16()),
    "cautious must be False": rmsprop(0.1, momentum=0.9, cautious=True),
}
WITHOUT_FORM = {
    "decay must be the same in all steps": rmsprop(0.1, slow),
    "momentum must be the same in all steps": rmsprop(0.1, momentum=slow),
    "learning_rate must be the same in all steps if lr_in_momentum": rmsprop(
        slow, momentum=0.9, lr_in_momentum=False
    ),
    "weight_decay must be None or decoupled, got 0.1": rmsprop(0.1, weight_decay=0.1),
    "learning_rate and weight_decay must be numbers": rmsprop(
        slow, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "whose product is below 1": rmsprop(0.5, weight_decay=2.0, decoupled_weight_decay=True),
}


@pytest.mark.parametrize("message", REFUSED | WITHOUT_FORM)
def test_what_rows_cannot_follow_is_refused_by_name(message):
    tx = (REFUSED | WITHOUT_FORM)[message]
    with pytest.raises(ValueError, match=message):
        rows.init(tx, TABLE)
    if message in WITHOUT_FORM:
        rows.init(tx, TABLE, lazy=True)
    else:
        with pytest.raises(ValueError, match=message):
            rows.init(tx, TABLE, lazy=True)


def test_bias_is_not_corrected_lazily():
    tx = rmsprop(0.1, bias_correction=True)
    rows.init(tx, TABLE)
    with pytest.raises(ValueError, match=r"^bias_correction must be False if lazy"):
        rows.init(tx, TABLE, lazy=True)


@pytest.mark.parametrize(
    "tx",
    [
        optax.rmsprop(0.1),
        optax.chain(optax.clip(1.0), TX),
        optax.inject_hyperparams(rmsprop)(0.1),
        low_memory.master_weights(TX),
        None,
    ],
)
def test_another_transformation_is_refused(tx):
    for call in (
        lambda: rows.init(tx, TABLE),
        lambda: rows.update(tx, jnp.arange(3), ONES, TABLE, STATE),
        lambda: rows.settle(tx, TABLE, STATE),
    ):
        with pytest.raises(TypeError, match=f"^tx must be what rmsprop.*{ALONE}, got "):
            call()


@pytest.mark.parametrize(
    "table",
    [
        jnp.ones(()),
        1.0,
        None,
        jnp.arange(3),
        jnp.ones((3, 2), jnp.bfloat16),
        jnp.ones((3, 2), jnp.float16),
        {"a": TABLE},
    ],
    ids=repr,
)
def test_a_table_is_an_array_of_rows(table):
    with pytest.raises(TypeError, match=r"^table must be one array of rows, of float32"):
        rows.init(TX, table)


@pytest.mark.parametrize("indices", [[0, 1], jnp.ones(3), jnp.ones(3, bool), 1, None])
def test_indices_are_integers(indices):
    with pytest.raises(TypeError, match=r"^indices must be an array of integers, got "):
        rows.update(TX, indices, ONES, TABLE, STATE)


def test_gradients_must_fit():
    for wrong in ((3, 1), TABLE.shape):
        with pytest.raises(AssertionError, match=r"\(3, 2\).*row_grads must have a row"):
            rows.update(TX, jnp.arange(3), jnp.ones(wrong), TABLE, STATE)
    with pytest.raises(AssertionError, match="complex"):
        rows.update(TX, jnp.arange(3), ONES.astype(jnp.complex64), TABLE, STATE)
    with pytest.raises(TypeError, match=r"^row_grads must be floating or complex, got int32"):
        rows.update(TX, jnp.arange(3), jnp.ones((3, 2), int), TABLE, STATE)


def test_a_state_must_be_of_the_table_and_the_transformation(subtests):
    at = jnp.arange(3)
    lazy = rows.init(TX, TABLE, lazy=True)
    cases = {
        "state must be a RowsState, got RMSPropState": (TypeError, TX, TABLE, STATE.inner),
        "state must be of this table, float32[6, 2], got nu of float32[5, 2]": (
            ValueError,
            TX,
            jnp.ones((6, 2)),
            STATE,
        ),
        "state.trace must be None": (ValueError, rmsprop(0.1), TABLE, STATE),
        "state.steps must have a number for each of 5 rows, got int32[4]": (
            ValueError,
            TX,
            TABLE,
            STATE._replace(steps=jnp.zeros(4, jnp.int32)),
        ),
    }
    for message, (error, tx, table, state) in cases.items():
        with subtests.test(message), pytest.raises(error, match=f"^{re.escape(message)}"):
            rows.update(tx, at, ONES, table, state)
    for call in (
        lambda: rows.advance(TX, at, TABLE, lazy),
        lambda: rows.settle(TX, TABLE, lazy),
    ):
        with pytest.raises(ValueError, match=r"^state must not be lazy"):
            call()
    with pytest.raises(TypeError, match=r"^lazy must be True or False, got 1$"):
        rows.init(TX, TABLE, lazy=1)
    with pytest.raises(ValueError, match=r"^state must be of this table"):
        rows.init(TX, jnp.ones((6, 2)), STATE.inner)
    with pytest.raises(TypeError, match=r"^state must be of type RMSPropState"):
        rows.init(TX, TABLE, STATE)

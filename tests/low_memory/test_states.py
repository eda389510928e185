"""The states that a storage accepts, and those it refuses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import low_memory, rmsprop
from small_states import trained
from storages import FULL, GRADS, PARAMS, SMALL, STACKED, types

each_storage = pytest.mark.parametrize("storage", SMALL.values(), ids=SMALL)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), tree)


def assert_refused(tx, state, error, message):
    """Eagerly and when traced."""
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(error, match=message):
            update(GRADS[0], state, PARAMS)


@each_storage
def test_a_state_that_was_cast_is_refused(storage, subtests):
    """All of it, or the slots alone."""
    tx = rmsprop(0.1, **FULL, storage=storage)
    state = trained(storage)
    for dtype in ("float16", "int32", "uint8"):
        like_params = functools.partial(cast, dtype=dtype)
        for what, broken in (
            ("all", cast(state, dtype)),
            ("like params", optax.tree.map_params(tx, like_params, state)),
            ("trace", state._replace(trace=cast(state.trace, dtype))),
        ):
            with subtests.test(dtype=dtype, what=what):
                assert_refused(tx, broken, (TypeError, AssertionError), dtype)


@each_storage
def test_a_state_whose_floats_were_cast_to_bfloat16_is_refused_or_goes_on(storage):
    """As by map_params of a mixed-precision policy: the scales are then no more what they were."""
    tx = rmsprop(0.1, **FULL, storage=storage)
    state = trained(storage)
    half = jax.tree.map(
        lambda leaf: cast(leaf, jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, state
    )._replace(weight_sum=state.weight_sum)
    assert types(half) != types(state)
    if storage is SMALL["q8"]:
        assert_refused(tx, half, (TypeError, AssertionError), "bfloat16")
    else:
        _, new = jax.jit(tx.update)(GRADS[0], half, PARAMS)
        assert types(new) == types(half)


def codes_as(field, dtype, names="wb"):
    return field._replace(codes=field.codes | {n: cast(field.codes[n], dtype) for n in names})


def test_codes_and_scales_of_other_dtypes_and_shapes_are_refused(subtests):
    """Codes of the other field, too: they stand for other numbers."""
    tx = rmsprop(0.1, **FULL, storage=SMALL["q8"])
    state = trained(SMALL["q8"])
    for field, own, other in (("nu", "uint8", "int8"), ("trace", "int8", "uint8")):
        held = getattr(state, field)
        codes = rf"state\.{field}\.codes must be {own} or floating, got "
        scales = rf"state\.{field}\.scales must be float32, one for each of 3 leaves, got "
        floating = rf"leaves '[bw]': gradient float32.*{field} float16"
        for what, broken, error, message in (
            ("all codes", codes_as(held, other), TypeError, codes + other),
            ("one code", codes_as(held, other, "b"), TypeError, codes + other),
            ("int32", codes_as(held, "int32"), TypeError, codes + "int32"),
            ("bool", codes_as(held, "bool", "w"), TypeError, codes + "bool"),
            ("float16", codes_as(held, "float16"), AssertionError, floating),
            *(
                (dtype, held._replace(scales=cast(held.scales, dtype)), TypeError, scales + dtype)
                for dtype in ("float16", "bfloat16", "int32", "uint8")
            ),
            *(
                (shape, held._replace(scales=jnp.ones(shape)), TypeError, scales)
                for shape in ((), (1,), (2,), (4,), (1, 3))
            ),
        ):
            with subtests.test(what=what, field=field):
                assert_refused(tx, state._replace(**{field: broken}), error, message)
    swapped = state._replace(nu=state.trace, trace=state.nu)
    assert_refused(tx, swapped, TypeError, r"state\.nu\.codes must be uint8 or floating, got int8")


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_a_plain_state_of_codes_is_refused(dtype):
    state = cast(rmsprop(0.1, **FULL).init(PARAMS), dtype)
    for storage, error, message in (
        (SMALL["q8"], TypeError, "state.nu must be of this storage, got dict"),
        (SMALL["bfloat16"], AssertionError, dtype),
    ):
        assert_refused(rmsprop(0.1, **FULL, storage=storage), state, error, message)


def test_the_slots_of_other_parameters_are_refused():
    tx = rmsprop(0.1, storage=SMALL["q8"])
    other = tx.init(PARAMS | {"w": jnp.ones((4, 64))})
    with pytest.raises(AssertionError, match=r"'w'.*\[4, 32\].*\[4, 64\]"):
        tx.update(GRADS[0], other)
    with pytest.raises(AssertionError, match=r"missing \['w'\]"):
        tx.update({"b": GRADS[0]["b"], "s": GRADS[0]["s"]}, tx.init(PARAMS))


ANY = {"float32": None, **SMALL, "other leaves": low_memory.q8(min_size=64)}
TXS = {name: rmsprop(0.1, **FULL, storage=storage) for name, storage in ANY.items()}
# The second is of a state that the first takes and goes on with as it is held.
TAKEN = [("q8", "other leaves"), ("other leaves", "q8"), ("bfloat16", "float32")]


def test_a_state_of_another_storage_goes_on_as_it_is_held(subtests):
    """Like in its own; where that is float32, what is not finite would make a difference."""

    @jax.jit
    def run(grads):
        pairs = [*TAKEN, *((name, name) for name in TXS)]

        def step(states, g):
            return {p: TXS[p[0]].update(g, s, PARAMS)[1] for p, s in states.items()}, None

        return jax.lax.scan(step, {p: TXS[p[1]].init(PARAMS) for p in pairs}, grads)[0]

    states = run(STACKED)
    for name, other in TAKEN:
        with subtests.test(state=other, storage=name):
            got, want = states[name, other], states[other, other]
            assert types(got) == types(want)
            assert np.any(jax.tree.leaves(want.trace)[0])
            for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6 if other == "float32" else 0)


IN_CODES, IN_ARRAYS = ("q8", "other leaves"), ("float32", "bfloat16")
MIXED = [*itertools.product(IN_CODES, IN_ARRAYS), *itertools.product(IN_ARRAYS, IN_CODES)]


@pytest.mark.parametrize(("name", "other"), MIXED)
def test_codes_are_refused_by_those_who_have_none_and_arrays_by_those_who_have(name, other):
    tx, state = TXS[name], TXS[other].init(PARAMS)
    one = tx.init(PARAMS)._replace(trace=state.trace)
    for field, held in (("nu", state), ("trace", one)):
        kind = type(getattr(state, field)).__name__
        message = rf"state\.{field} must be of this storage, got {kind}: convert\.change_storage"
        assert_refused(tx, held, TypeError, message)


def test_a_state_in_bfloat16_is_refused_where_all_are_in_float32():
    state = TXS["bfloat16"].init(PARAMS)
    message = r"leaves '[bw]': gradient float32.*bfloat16"
    assert_refused(TXS["float32"], state, AssertionError, message)

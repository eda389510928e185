"""The arguments of a storage, where it may be used, and how it is printed."""

import functools
from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import describe, dialects, low_memory, recipes, rmsprop, scale_by_rms
from small_states import after, table

MAKE = (low_memory.q8, low_memory.bfloat16)


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (low_memory.q8, {"min_size": -1}, ValueError, "min_size must be at least 0, got -1"),
        (low_memory.q8, {"min_size": None}, TypeError, "min_size must be an integer, got None"),
        *(
            (make, *rest)
            for make in MAKE
            for rest in (
                ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
                ({"seed": "1"}, TypeError, "seed must be an integer, got '1'"),
                (
                    {"exempt": "x"},
                    TypeError,
                    "exempt must be a function of a path or None, got 'x'",
                ),
                ({"axis_name": 3}, TypeError, "axis_name must be a name or a tuple of names or No"),
                ({"axis_name": ("x", 3)}, TypeError, "axis_name must be a name .* got .'x', 3."),
            )
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_refused_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_any_integer_is_a_seed(subtests):
    x = np.ones(4096, np.float32)
    for seed in (0, -1, 2**32, 2**70, np.int64(3)):
        for make in MAKE:
            with subtests.test(seed=seed, storage=make.__name__):
                storage = make(seed=seed)
                assert storage == make(seed=int(seed))
                tx = rmsprop(0.1, storage=storage)
                jax.eval_shape(tx.update, x, jax.eval_shape(tx.init, x))


def test_equal_storages_are_one_argument():
    """So that a transformation built anew is not compiled anew."""
    for make in MAKE:
        assert make(seed=1) == make(seed=1)
        assert hash(make(seed=1)) == hash(make(seed=1))
        assert make(seed=1) != make(seed=2)
    assert low_memory.q8() != low_memory.q8(min_size=0)
    assert low_memory.q8() != low_memory.bfloat16()


# What a recipe needs to know of a run, by its name.
RUNS = {"total_timesteps": 1e6, "total_steps": 1e6, "batch_size": 80, "steps_per_epoch": 100}


def factory(name):
    make = getattr(recipes, name)
    return functools.partial(make, **{k: RUNS[k] for k in signature(make).parameters if k in RUNS})


FACTORIES = {
    "rmsprop": functools.partial(rmsprop, 0.1),
    "scale_by_rms": scale_by_rms,
    **{name: functools.partial(getattr(dialects, name), 0.1) for name in dialects.__all__},
    **{name: factory(name) for name in recipes.__all__},
}


def test_a_storage_goes_to_every_dialect_and_recipe(subtests):
    made = [make(storage=low_memory.q8(min_size=0)) for make in FACTORIES.values()]
    runs = after(lambda: made, np.ones((1, 4, 128), np.float32), table(4))
    for name, tx, (updates, state) in zip(FACTORIES, made, runs, strict=True):
        with subtests.test(name):
            assert np.all(np.isfinite(updates))
            assert any(array.dtype == jnp.uint8 for array in jax.tree.leaves(state))
            assert "held by q8(min_size=0, seed=0)" in describe(tx)


class Callable(type(low_memory.q8())):
    """Wrappers that inject would take it for a schedule."""

    def __call__(self, count):
        return count


CALLABLE = Callable(min_size=0, seed=0, exempt=None, axis_name=None)


def test_what_is_no_storage_is_refused(subtests):
    for name, make in FACTORIES.items():
        for value in (low_memory.q8, low_memory, "q8", 8, jnp.bfloat16, CALLABLE):
            with (
                subtests.test(name, storage=value),
                pytest.raises(TypeError, match="storage must be a Storage, got"),
            ):
                make(storage=value)


@pytest.mark.parametrize(
    ("storage", "written"),
    [
        (low_memory.q8(), "q8(min_size=4096, seed=0)"),
        (
            low_memory.q8(0, 3, axis_name=("x", "y")),
            "q8(min_size=0, seed=3, axis_name=('x', 'y'))",
        ),
        (low_memory.bfloat16(), "bfloat16(seed=0)"),
        (low_memory.bfloat16(5, axis_name="x"), "bfloat16(seed=5, axis_name='x')"),
    ],
    ids=str,
)
def test_a_storage_shows_itself_as_it_is_written(storage, written):
    assert repr(storage) == written
    assert eval(written, vars(low_memory)) == storage
    assert describe(rmsprop(0.1, storage=storage)).endswith(f"\nheld by {written}")

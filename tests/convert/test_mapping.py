"""Mappings of parameters to arrays of another framework, and parameters converted by them."""

import contextlib

from hypothesis import event, given, settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from conversions import assert_same
from rmsprop_jax import convert, dialects
from rmsprop_jax.convert import Leaf
from rmsprop_jax.convert._mapping import assembled, resolve, take


@st.composite
def layouts(draw):
    """Arrays of another framework, and a mapping of leaves to them with the leaves' shapes."""
    arrays, mapping, shapes = {}, {}, {}
    for index in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from([f"array {index}", index]))
        kind = draw(st.sampled_from(["whole", "parts", "image"]))
        shape = draw(st.lists(st.integers(1, 3), min_size=0 if kind == "whole" else 1, max_size=4))
        axes = tuple(draw(st.permutations(range(len(shape)))))
        if kind == "image":
            rows, *rest = [*shape, 2]
            order = tuple(draw(st.permutations(range(len(rest) + 1))))
            whole = (rows, int(np.prod(rest)))
            folded = (draw(st.sampled_from([-1, rows])), *rest)
            mapping[f"{index}"] = Leaf(name, order, folded)
            shapes[f"{index}"] = draw(
                st.sampled_from([(rows * whole[1],), tuple(np.take([rows, *rest], order))])
            )
        elif kind == "parts":
            count, axis = draw(st.integers(1, 3)), draw(st.integers(0, len(shape) - 1))
            whole = tuple(n * count if i == axis else n for i, n in enumerate(shape))
            for i in range(count):
                mapping[f"{index}/{i}"] = Leaf(name, axes, part=(i, count, axis))
                shapes[f"{index}/{i}"] = tuple(np.take(shape, axes))
        else:
            whole = tuple(shape)
            mapping[f"{index}"] = draw(st.sampled_from([Leaf(name, axes), Leaf(name)]))
            shapes[f"{index}"] = tuple(
                np.take(shape, mapping[f"{index}"].axes or range(len(shape)))
            )
            shapes[f"{index}"] = tuple(int(n) for n in shapes[f"{index}"])
        arrays[name] = np.arange(np.prod(whole)).reshape(whole)
    return arrays, mapping, shapes


@settings(deadline=None, max_examples=200)
@given(layouts())
def test_put_undoes_take(layout):
    arrays, mapping, shapes = layout
    leaves = resolve(mapping, {path: np.zeros(shape) for path, shape in shapes.items()})
    values = {
        path: take(arrays[leaf.name], leaf, shapes[path], "it") for path, leaf in leaves.items()
    }
    assert sum(value.size for value in values.values()) == sum(a.size for a in arrays.values())
    again = assembled(values, leaves)
    assert set(again) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)


def shapes_of(draw, size):
    """A shape of an array of that size, with a number left open or not; or else any."""
    shape = []
    while size > 1 and len(shape) < 3 and draw(st.booleans()):
        shape.append(draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])))
        size //= shape[-1]
    shape.insert(draw(st.integers(0, len(shape))), size)
    if draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([-1, -1, 2]))
    return tuple(shape)


@st.composite
def uses(draw):
    """An array, a mapping of leaves to its parts, sound or not, and the shape of the leaves."""
    own = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 2, 3, 4, 6]), max_size=3)))
    data = np.random.default_rng(draw(st.integers(0, 99))).bytes(4 * int(np.prod(own)))
    found = array = np.frombuffer(data, np.float32).reshape(own)  # NaNs among them
    shape = draw(st.sampled_from([None, own, shapes_of(draw, array.size)]))
    original = draw(st.sampled_from([None, own, own, (-1, *own[1:]), shapes_of(draw, array.size)]))
    with contextlib.suppress(ValueError):
        found = array.reshape(shape or original or own)
    axis = draw(st.integers(-found.ndim, max(found.ndim - 1, 0)))
    count = draw(st.integers(1, 4))
    with contextlib.suppress(ValueError, IndexError):
        found = np.split(found, count, axis)[0]
    axes = draw(st.one_of(st.none(), st.permutations(range(found.ndim))))
    if axes is not None:  # counted from the end, too; and a few of them left out or twice
        found = found.transpose(axes)
        axes = [a - len(axes) * draw(st.booleans()) for a in axes]
        axes = tuple(draw(st.sampled_from([axes, axes, axes, axes[:1], axes[:1] * len(axes)])))
    ours = draw(st.sampled_from([found.shape, found.shape, (found.size,), (*found.shape, 1), own]))
    leaf = Leaf("x", axes, shape, original=original)
    whole = count == 1 and draw(st.booleans())
    parts = [leaf._replace(part=None if whole else (i, count, axis)) for i in range(count)]
    return array, parts, ours


def gone_and_back(array, parts, ours):
    """What is assembled of what is taken."""
    mapping = {f"{i}": leaf for i, leaf in enumerate(parts)}
    leaves = resolve(mapping, {path: np.zeros(ours) for path in mapping})
    values = {path: take(array, leaf, ours, "it") for path, leaf in leaves.items()}
    assert all(value.shape == ours for value in values.values())
    return assembled(values, leaves)["x"]


def assert_same_bits(got, want):
    assert (got.shape, got.dtype, got.tobytes()) == (want.shape, want.dtype, want.tobytes())


@settings(deadline=None, max_examples=1000)
@given(uses())
def test_what_take_accepts_comes_back_bit_for_bit(use):
    """And in its own shape; all else is refused."""
    array, parts, ours = use
    try:
        again = gone_and_back(array, parts, ours)
    except ValueError:
        event("refused")
        return
    event(f"back, shape {parts[0].shape is not None}, {len(parts)} parts")
    assert_same_bits(again, array)


@pytest.mark.parametrize(
    ("shape", "leaf", "count", "ours"),
    [
        ((12,), Leaf("x", (1, 0), (3, 4), original=(12,)), 1, (4, 3)),
        ((12,), Leaf("x", (1, 0), (3, 4), original=(-1,)), 1, (12,)),
        ((8, 8), Leaf("x", (2, 0, 1), (2, 4, 8), original=(8, 8)), 1, (8, 2, 4)),
        ((8, 8), Leaf("x", (-1, 0, 1), (2, 4, 8), original=(-1, 8)), 1, (8, 2, 4)),
        ((2, 3, 4), Leaf("x", (1, 0), (6, 4), original=(2, -1, 4)), 1, (4, 6)),
        ((2, 9), Leaf("x", None, (6, -1), original=(2, -1)), 6, (3,)),
        ((12, 4), Leaf("x", (2, 0, 1), (6, 2, 4), original=(12, 4)), 3, (4, 2, 2)),
        ((12, 4), Leaf("x", (1, 0), original=(12, 4)), 3, (4, 2, 2)),
        ((2, 2), Leaf("x", original=(2, 2)), 1, (4,)),
        ((), Leaf("x", None, (1, 1), original=()), 1, (1,)),
        ((0, 3), Leaf("x", None, (3, 0), original=(0, 3)), 1, (3, 0)),
        ((3, 8), Leaf("x", (2, 1, 0), (-1, 2, 4)), 1, (4, 2, 3)),
    ],
)
def test_arrays_of_any_rank_may_be_given_a_shape(shape, leaf, count, ours):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    parts = [leaf._replace(part=(i, count, 0)) for i in range(count)]
    assert_same_bits(gone_and_back(array, parts, ours), array)


def test_refuses_an_array_that_would_not_come_back():
    leaf = Leaf("x", axes=(2, 0, 1), shape=(2, 4, 8))
    stated = leaf._replace(original=(8, 8))
    message = r"'x' has shape .*, not that of Leaf\(.*: give it as original"
    for shape, one in [((8, 8), leaf), ((64,), leaf), ((2, 32), stated)]:
        with pytest.raises(ValueError, match=message):
            convert.params_from({"x": np.ones(shape)}, {"a": np.zeros((8, 2, 4))}, {"a": one})


def test_arrays_that_are_added_there_are_summed_and_shared_out():
    mapping = {"bias": Leaf("b", also=("c",))}
    params = {"bias": jnp.zeros(3)}
    found = convert.params_from({"b": [1.0, 2, 3], "c": [10.0, 20, 30]}, params, mapping)
    np.testing.assert_array_equal(found["bias"], [11, 22, 33])
    back = convert.params_to(found, mapping)
    assert set(back) == {"b", "c"}
    np.testing.assert_array_equal(back["b"], [5.5, 11, 16.5])
    np.testing.assert_array_equal(back["c"], back["b"])


def test_parts_of_one_array_that_are_added_there():
    first, second = (Leaf("b", shape=(4, -1), part=(i, 4, 0), original=(2, -1)) for i in (0, 2))
    one, other = (leaf._replace(part=(leaf.part[0] + 1, 4, 0)) for leaf in (first, second))
    mapping = {"sum": first._replace(also=(second,)), "one": one, "other": other}
    params = {path: jnp.zeros(3) for path in mapping}
    array = np.arange(12.0).reshape(2, 6)
    found = convert.params_from({"b": array}, params, mapping)
    np.testing.assert_array_equal(found["sum"], array[0, :3] + array[1, :3])
    np.testing.assert_array_equal(found["one"], array[0, 3:])
    np.testing.assert_array_equal(found["other"], array[1, 3:])
    array[:, :3] = array[:, :3].mean(0)
    np.testing.assert_array_equal(convert.params_to(found, mapping)["b"], array)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_parameters_come_in_the_dtype_of_ours(dtype):
    found = convert.params_from({"w": np.float64([1 / 3])}, {"w": jnp.zeros(1, dtype)}, {"w": "w"})
    assert found["w"].dtype == dtype
    assert found["w"] == jnp.asarray(1 / 3, dtype)


def test_a_tree_may_be_one_leaf():
    tx, x = dialects.keras(0.1, momentum=0.9), jnp.ones(3)
    _, state = tx.update(x, tx.init(x))
    given = convert.to_keras(state, x, {"": 0}, tx, learning_rate=0.1)
    assert [a.shape for a in given] == [(), (), (3,), (3,)]
    assert_same(convert.from_keras(given, x, {"": 0}, tx), state)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, r"every parameter: \['a', 'b'\] are missing"),
        ({"a": "x"}, r"every parameter: \['b'\] are missing"),
        ({"a": "x", "b": "y", "c": "z"}, r"names \['c'\], but params has only \['a', 'b'\]"),
        ({"a": "x", "b": "x"}, "use 'x' once, or each of its parts"),
        ({"a": "x", "b": Leaf("y", also=("x",))}, "use 'x' once"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": "y"}, "use 'x' once, or each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(0, 2, 0))}, "each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(2, 2, 0))}, "each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(1, 3, 0))}, "each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(1, 2, 1))}, "each of its parts"),
        ({"a": "x", "b": Leaf("y", also=("y",))}, "use 'y' once"),
        (
            {"a": Leaf("x", None, (2, 2), (0, 2, 0)), "b": Leaf("x", None, (4, 1), (1, 2, 0))},
            "same",
        ),
        ({"a": "x", "b": "z"}, r"mapping names \['z'\], but the source has only \['x', 'y'\]"),
        ({"a": "x", "b": Leaf("y", (1, 0))}, r"'y' has shape \(4,\).*does not become \(4,\)"),
        ({"a": "x", "b": Leaf("y", (0,), (-1,))}, r"'y' has shape \(4,\)"),
        ({"a": "x", "b": Leaf("y", None, (3, -1))}, r"'y' has shape \(4,\)"),
    ],
)
def test_refuses_mappings(mapping, message):
    params = {"a": np.zeros(4), "b": np.zeros(4)}
    with pytest.raises(ValueError, match=message):
        convert.params_from({"x": np.ones(4), "y": np.ones(4)}, params, mapping)


def test_refuses_parts_that_do_not_divide_their_array():
    params, mapping = {"a": np.zeros(2), "b": np.zeros(2)}, {}
    for axis, shape in ((1, (4,)), (-2, (4,)), (0, (5,)), (0, ())):
        mapping = {path: Leaf("x", part=(i, 2, axis)) for i, path in enumerate("ab")}
        with pytest.raises(ValueError, match=rf"'x' has shape .*, not 2 parts on axis {axis}"):
            convert.params_from({"x": np.ones(shape)}, params, mapping)


def test_refuses_what_is_not_a_mapping_of_names():
    for value in (None, 1.5, ("x", (1, 0)), True):
        with pytest.raises(TypeError, match="a Leaf, name or number for each path, got"):
            convert.params_from({"x": np.ones(4)}, {"a": np.zeros(4)}, {"a": value})


def test_refuses_arrays_that_nothing_is_made_of():
    arrays = {"x": np.ones(4), "y": np.ones(4), "steps": np.ones(())}
    with pytest.raises(ValueError, match=r"mapping has no entry for \['steps'\]"):
        convert.params_from(arrays, {"a": np.zeros(4), "b": np.zeros(4)}, {"a": "x", "b": "y"})


def test_refuses_parts_that_do_not_fit_each_other():
    params = {"a": np.zeros((2, 3)), "b": np.zeros((2, 2))}
    mapping = {path: Leaf("x", part=(i, 2, 0)) for i, path in enumerate("ab")}
    with pytest.raises(ValueError, match=r"parts of shapes \[\(2, 3\), \(2, 2\)\] do not make 'x'"):
        convert.params_to(params, mapping)


def test_refuses_parameters_that_do_not_fit_their_mapping():
    bad = [Leaf("x", (1, 0)), Leaf("x", (0, 1), (3, 2)), Leaf("x", (2, 1, 0), (-1, 2))]
    # Axes that leave one out, or have one twice.
    bad += [Leaf("x", (0,), (4, 1)), Leaf("x", (0, 0), (2, 2))]
    for leaf in bad:
        with pytest.raises(ValueError, match=r"'a' has shape \(4,\)"):
            convert.params_to({"a": np.zeros(4)}, {"a": leaf})

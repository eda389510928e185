"""Mappings of parameters to the arrays of another framework, and parameters by them."""

from hypothesis import given, settings
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


def test_arrays_that_are_added_there_are_summed_and_shared_out():
    mapping = {"bias": Leaf("b", also=("c",))}
    params = {"bias": jnp.zeros(3)}
    found = convert.params_from({"b": [1.0, 2, 3], "c": [10.0, 20, 30]}, params, mapping)
    np.testing.assert_array_equal(found["bias"], [11, 22, 33])
    back = convert.params_to(found, mapping)
    assert set(back) == {"b", "c"}
    np.testing.assert_array_equal(back["b"], [5.5, 11, 16.5])
    np.testing.assert_array_equal(back["c"], back["b"])


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
        ({"a": "x", "b": "y", "c": "z"}, r"names \['c'\], of which params has only \['a', 'b'\]"),
        ({"a": "x", "b": "x"}, "use 'x' once, or each of its parts"),
        ({"a": "x", "b": Leaf("y", also=("x",))}, "use 'x' once"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": "y"}, "use 'x' once, or each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(0, 2, 0))}, "each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(2, 2, 0))}, "each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(1, 3, 0))}, "each of its parts"),
        ({"a": Leaf("x", part=(0, 2, 0)), "b": Leaf("x", part=(1, 2, 1))}, "each of its parts"),
        ({"a": "x", "b": "z"}, r"mapping names \['z'\], of which there are only \['x', 'y'\]"),
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
        with pytest.raises(TypeError, match="a Leaf, a name or a number a path, got"):
            convert.params_from({"x": np.ones(4)}, {"a": np.zeros(4)}, {"a": value})


def test_refuses_arrays_that_nothing_is_made_of():
    arrays = {"x": np.ones(4), "y": np.ones(4), "steps": np.ones(())}
    with pytest.raises(ValueError, match=r"mapping names nothing of \['steps'\]"):
        convert.params_from(arrays, {"a": np.zeros(4), "b": np.zeros(4)}, {"a": "x", "b": "y"})


def test_refuses_parameters_that_do_not_fit_their_mapping():
    for leaf in (Leaf("x", (1, 0)), Leaf("x", (0, 1), (3, 2)), Leaf("x", (2, 1, 0), (-1, 2))):
        with pytest.raises(ValueError, match=r"'a' has shape \(4,\)"):
            convert.params_to({"a": np.zeros(4)}, {"a": leaf})


def test_refuses_cells_that_flax_has_not():
    for lstm in (convert.torch_lstm, convert.keras_lstm):
        with pytest.raises(ValueError, match=r"cell must be one of .*'linen', 'nnx'.*, got 'gru'"):
            lstm("cell", "lstm", "gru")


def test_ready_made_mappings_can_go_without_a_bias():
    for layer in (convert.torch_dense, convert.torch_conv, convert.keras_dense, convert.keras_conv):
        assert set(layer("a", "b")) == {"a/kernel", "a/bias"}
        assert set(layer("a", "b", bias=False)) == {"a/kernel"}
    assert set(convert.torch_dense_after_conv("a", "b", (1, 2, 3), bias=False)) == {"a/kernel"}

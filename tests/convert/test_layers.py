"""What the ready-made mappings name and refuse; test_models.py tests that they are correct."""

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conversions import assert_same
from rmsprop_jax import convert


def test_refuses_cells_that_flax_has_not():
    for lstm in (convert.torch_lstm, convert.keras_lstm):
        with pytest.raises(ValueError, match=r"cell must be one of .*'linen', 'nnx'.*, got 'gru'"):
            lstm("cell", "lstm", "gru")
    with pytest.raises(ValueError, match=r"cell must be one of \['linen', 'nnx'\], got 'lstm'"):
        convert.torch_gru("cell", "gru", "lstm")
    with pytest.raises(ValueError, match=r"cell must be 'linen', got 'nnx'"):
        convert.keras_gru("cell", "gru/gru_cell", "nnx")


def fits(mapping, params):
    """The shapes of the framework's arrays, which become these parameters and come back."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), params)
    arrays = convert.params_to(params, mapping)
    assert_same(convert.params_from(arrays, params, mapping), params)
    return {name: a.shape for name, a in arrays.items()}


def test_attention_with_and_without_biases():
    """The shapes that PyTorch and Keras have, in linen and NNX."""
    x = jnp.zeros((2, 5, 6))
    for bias in (True, False):
        layer = linen.MultiHeadDotProductAttention(2, use_bias=bias)
        ours = jax.eval_shape(layer.init, jax.random.key(0), x)
        split = jax.eval_shape(
            lambda bias=bias: nnx.state(
                nnx.MultiHeadAttention(2, 6, use_bias=bias, decode=False, rngs=nnx.Rngs(0)),
                nnx.Param,
            )
        )
        for params in ({"att": ours["params"]}, {"att": split}):
            torch = {"in_proj_weight": (18, 6), "out_proj.weight": (6, 6)}
            torch |= {"in_proj_bias": (18,), "out_proj.bias": (6,)} if bias else {}
            found = fits(convert.torch_attention("att", "t", 6, bias=bias), params)
            assert found == {f"t.{name}": shape for name, shape in torch.items()}
            keras = {f"{n}/kernel": (6, 2, 3) for n in ("query", "key", "value")}
            keras["attention_output/kernel"] = (2, 3, 6)
            if bias:
                keras |= {f"{n}/bias": (2, 3) for n in ("query", "key", "value")}
                keras["attention_output/bias"] = (6,)
            found = fits(convert.keras_attention("att", "k", bias=bias), params)
            assert found == {f"k/{name}": shape for name, shape in keras.items()}


def test_refuses_attention_of_other_features():
    layer = linen.MultiHeadDotProductAttention(2)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((2, 5, 6)))["params"]
    params = {"att": jax.tree.map(lambda a: jnp.zeros(a.shape), params)}
    arrays = convert.params_to(params, convert.torch_attention("att", "t", 6))
    for features in (4, 12):
        mapping = convert.torch_attention("att", "t", features)
        with pytest.raises(ValueError, match=r"'t.in_proj_bias' has shape \(18,\)"):
            convert.params_from(arrays, params, mapping)
        with pytest.raises(ValueError, match=r"'att/.*' has shape .*, which does not match Leaf"):
            convert.params_to(params, mapping)
    mapping = convert.torch_attention("att", "t", 6)
    separate = arrays | {f"t.{n}_proj_weight": np.zeros((6, 6)) for n in "qkv"}
    del separate["t.in_proj_weight"]
    with pytest.raises(ValueError, match=r"mapping names \['t.in_proj_weight'\]"):
        convert.params_from(separate, params, mapping)
    extra = arrays | {f"t.bias_{n}": np.zeros((1, 1, 6)) for n in "kv"}
    with pytest.raises(ValueError, match=r"mapping has no entry for \['t.bias_k', 't.bias_v'\]"):
        convert.params_from(extra, params, mapping)


def test_refuses_gru_cells_that_do_something_else(default_promotion):
    """NNX's own has no bias of the hidden state; Keras's with reset_after=False has one bias."""
    split = jax.eval_shape(lambda: nnx.state(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), nnx.Param))
    mapping = convert.torch_gru("cell", "gru", "nnx")
    with pytest.raises(ValueError, match=r"mapping names \['cell/dense_h/bias'\]"):
        convert.params_to({"cell": split}, mapping)
    h = jnp.zeros((2, 4))
    params = jax.eval_shape(linen.GRUCell(4).init, jax.random.key(0), h, jnp.zeros((2, 3)))
    params = {"cell": jax.tree.map(lambda a: jnp.zeros(a.shape), params["params"])}
    arrays = convert.params_to(params, mapping := convert.keras_gru("cell", "k", "linen"))
    assert {name: a.shape for name, a in arrays.items()} == {
        "k/kernel": (3, 12),
        "k/recurrent_kernel": (4, 12),
        "k/bias": (2, 12),
    }
    with pytest.raises(ValueError, match=r"'k/bias' has shape \(12,\), not that of Leaf"):
        convert.params_from(arrays | {"k/bias": np.zeros(12)}, params, mapping)


def test_ready_made_mappings_can_go_without_a_bias():
    for layer in (convert.torch_dense, convert.torch_conv, convert.keras_dense, convert.keras_conv):
        assert set(layer("a", "b")) == {"a/kernel", "a/bias"}
        assert set(layer("a", "b", bias=False)) == {"a/kernel"}
    assert set(convert.torch_dense_after_conv("a", "b", (1, 2, 3), bias=False)) == {"a/kernel"}

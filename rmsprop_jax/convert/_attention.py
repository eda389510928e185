"""Ready-made mappings of multi-head attention."""

from rmsprop_jax.convert._mapping import Leaf


def torch_attention(path: str, name: str, features: int, *, bias: bool = True) -> dict[str, Leaf]:
    """Maps Flax's ``MultiHeadDotProductAttention`` to ``torch.nn.MultiheadAttention``.

    Also for ``MultiHeadAttention``, of linen or NNX, without ``normalize_qk``. PyTorch's layer must
    have keys and values with as many features as its queries, and neither ``add_bias_kv`` nor
    ``add_zero_attn``. Its boolean masks say what is left out, those of Flax what is kept.

    Args:
      path: path of Flax's layer.
      name: name of PyTorch's layer.
      features: PyTorch's ``embed_dim``; in Flax the features of the inputs, of all heads together,
        and of the outputs.
      bias: whether the layer has biases.

    Example:
      >>> from rmsprop_jax import convert
      >>> mapping = convert.torch_attention("attention", "self_attn", 512)
      >>> mapping["attention/key/kernel"].part  # of in_proj_weight, (1536, 512)
      (1, 3, 0)
    """
    # PyTorch has the heads one after another in one axis, so ours are only flattened.
    kernel = Leaf(f"{name}.in_proj_weight", (1, 0), original=(3 * features, features))
    biases = Leaf(f"{name}.in_proj_bias", original=(3 * features,))
    out = Leaf(f"{name}.out_proj.weight", (1, 0), original=(features, features))
    mapping = {f"{path}/out/kernel": out}
    if bias:
        mapping[f"{path}/out/bias"] = Leaf(f"{name}.out_proj.bias")
    for i, layer in enumerate(("query", "key", "value")):
        mapping[f"{path}/{layer}/kernel"] = kernel._replace(part=(i, 3, 0))
        if bias:
            mapping[f"{path}/{layer}/bias"] = biases._replace(part=(i, 3, 0))
    return mapping


def keras_attention(path: str, name: str, *, bias: bool = True) -> dict[str, Leaf]:
    """Maps Flax's ``MultiHeadDotProductAttention`` to ``keras.layers.MultiHeadAttention``.

    Also for ``MultiHeadAttention``, of linen or NNX, without ``normalize_qk``. Keras's layer must
    have a ``value_dim`` equal to its ``key_dim``, one axis to attend to, and no gate.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.keras_attention("attention", "model/attention")["attention/out/kernel"].name
      'model/attention/attention_output/kernel'
    """
    layers = {layer: layer for layer in ("query", "key", "value")} | {"out": "attention_output"}
    return {
        f"{path}/{ours}/{kind}": Leaf(f"{name}/{theirs}/{kind}")
        for ours, theirs in layers.items()
        for kind in ("kernel", *["bias"] * bias)
    }

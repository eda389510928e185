"""Ready-made mappings of attention with several heads."""

from rmsprop_jax.convert._mapping import Leaf


def torch_attention(path: str, name: str, features: int, *, bias: bool = True) -> dict[str, Leaf]:
    """Flax's ``MultiHeadDotProductAttention``, ``torch.nn.MultiheadAttention`` of a name.

    Or ``MultiHeadAttention``, of linen or NNX, without ``normalize_qk``. PyTorch's must have keys
    and values of as many features as its queries, and neither ``add_bias_kv`` nor
    ``add_zero_attn``. Its boolean masks say what is left out, those of Flax what is not.

    Args:
      path: of Flax's layer.
      name: of PyTorch's.
      features: PyTorch's ``embed_dim``; in Flax those of the inputs, of all heads together, and of
        the outputs.
      bias: whether the layer has them.

    Example:
      >>> from rmsprop_jax import convert
      >>> mapping = convert.torch_attention("attention", "self_attn", 512)
      >>> mapping["attention/key/kernel"].part  # of in_proj_weight, (1536, 512)
      (1, 3, 0)
    """
    # PyTorch has the heads one after another in an axis, so that ours is only made flat.
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
    """Flax's ``MultiHeadDotProductAttention``, ``keras.layers.MultiHeadAttention`` of a name.

    Or ``MultiHeadAttention``, of linen or NNX, without ``normalize_qk``. Keras's must have its
    ``value_dim`` equal to its ``key_dim``, one axis to attend to, and no gate.

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

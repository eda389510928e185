"""Ready-made mappings of the layers that Flax, PyTorch and Keras have in common.

Each function returns the entries of a mapping for one layer, from its path in Flax and its name in
the framework. The mapping of a model is their union: ``torch_dense("fc1", "fc1") |
torch_dense("fc2", "fc2")``.
"""

from rmsprop_jax.convert._mapping import Leaf


def torch_dense(path: str, name: str, *, bias: bool = True) -> dict[str, Leaf]:
    """Maps Flax's ``Dense`` or ``Linear`` to ``torch.nn.Linear``.

    Example:
      >>> from rmsprop_jax import convert
      >>> kernel = convert.torch_dense("fc1", "layers.0")["fc1/kernel"]
      >>> kernel.name, kernel.axes
      ('layers.0.weight', (1, 0))
    """
    kernel = {f"{path}/kernel": Leaf(f"{name}.weight", (1, 0))}
    return kernel | _if(bias, {f"{path}/bias": Leaf(f"{name}.bias")})


def torch_dense_after_conv(
    path: str, name: str, image: tuple[int, int, int], *, bias: bool = True
) -> dict[str, Leaf]:
    """Maps a ``Dense`` on a flattened image of (height, width, channels) to ``torch.nn.Linear``.

    PyTorch flattens (channels, height, width), so the rows of the kernel are in another order.

    Args:
      path: path of Flax's layer.
      name: name of ``torch.nn.Linear``.
      image: height, width and channels of the image that is flattened.
      bias: whether the layer has a bias.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.torch_dense_after_conv("fc", "fc", (4, 4, 16), bias=False)["fc/kernel"].axes
      (2, 3, 1, 0)
    """
    height, width, channels = image
    leaf = Leaf(f"{name}.weight", (2, 3, 1, 0), (-1, channels, height, width))
    return {f"{path}/kernel": leaf} | _if(bias, {f"{path}/bias": Leaf(f"{name}.bias")})


def torch_conv(path: str, name: str, *, dims: int = 2, bias: bool = True) -> dict[str, Leaf]:
    """Maps Flax's ``Conv`` to ``torch.nn.Conv1d``, ``Conv2d`` or ``Conv3d``.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.torch_conv("conv", "features.0", bias=False)["conv/kernel"].axes
      (2, 3, 1, 0)
    """
    kernel = {f"{path}/kernel": Leaf(f"{name}.weight", (*range(2, dims + 2), 1, 0))}
    return kernel | _if(bias, {f"{path}/bias": Leaf(f"{name}.bias")})


def torch_norm(path: str, name: str) -> dict[str, Leaf]:
    """Maps Flax's ``BatchNorm``, ``LayerNorm`` or ``GroupNorm`` to that of PyTorch.

    Example:
      >>> from rmsprop_jax import convert
      >>> [leaf.name for leaf in convert.torch_norm("norm", "bn1").values()]
      ['bn1.weight', 'bn1.bias']
    """
    return {f"{path}/scale": Leaf(f"{name}.weight"), f"{path}/bias": Leaf(f"{name}.bias")}


def torch_norm_stats(path: str, name: str) -> dict[str, Leaf]:
    """Maps the running statistics of Flax's ``BatchNorm`` to those of PyTorch.

    Use it with :func:`params_from` on ``batch_stats`` or ``nnx.state(model, nnx.BatchStat)``, and
    the model's ``state_dict()``.

    In training the two move differently. PyTorch's momentum is the weight of the new batch, .1 by
    default. That of ``linen.BatchNorm`` and ``nnx.BatchNorm`` is the weight of the past, .99 by
    default: for PyTorch's m, set 1 - m in Flax. And if a batch has n numbers in a channel, the
    variance that PyTorch adds is the unbiased one, n / (n - 1) times that of Flax.

    Example:
      >>> from rmsprop_jax import convert
      >>> [leaf.name for leaf in convert.torch_norm_stats("norm", "bn1").values()]
      ['bn1.running_mean', 'bn1.running_var']
    """
    return {
        f"{path}/mean": Leaf(f"{name}.running_mean"),
        f"{path}/var": Leaf(f"{name}.running_var"),
    }


def torch_embedding(path: str, name: str) -> dict[str, Leaf]:
    """Maps Flax's ``Embed`` to ``torch.nn.Embedding``.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.torch_embedding("embed", "tokens")["embed/embedding"].name
      'tokens.weight'
    """
    return {f"{path}/embedding": Leaf(f"{name}.weight")}


def keras_dense(path: str, name: str, *, bias: bool = True) -> dict[str, Leaf]:
    """Maps Flax's ``Dense``, ``Linear`` or ``Conv`` to that of Keras.

    The layouts of their kernels are the same, except for Keras's depthwise and transposed
    convolutions.

    Example:
      >>> from rmsprop_jax import convert
      >>> [leaf.name for leaf in convert.keras_dense("fc1", "sequential/dense").values()]
      ['sequential/dense/kernel', 'sequential/dense/bias']
    """
    kernel = {f"{path}/kernel": Leaf(f"{name}/kernel")}
    return kernel | _if(bias, {f"{path}/bias": Leaf(f"{name}/bias")})


keras_conv = keras_dense


def keras_norm(path: str, name: str) -> dict[str, Leaf]:
    """Maps Flax's ``BatchNorm``, ``LayerNorm`` or ``GroupNorm`` to that of Keras.

    Example:
      >>> from rmsprop_jax import convert
      >>> [leaf.name for leaf in convert.keras_norm("norm", "model/bn").values()]
      ['model/bn/gamma', 'model/bn/beta']
    """
    return {f"{path}/scale": Leaf(f"{name}/gamma"), f"{path}/bias": Leaf(f"{name}/beta")}


def keras_norm_stats(path: str, name: str) -> dict[str, Leaf]:
    """Maps the running statistics of Flax's ``BatchNorm`` to those of Keras.

    Use it with :func:`params_from` on ``batch_stats`` or ``nnx.state(model, nnx.BatchStat)``, and
    ``{v.path: v for v in model.non_trainable_variables if "moving_" in v.path}``.

    Example:
      >>> from rmsprop_jax import convert
      >>> [leaf.name for leaf in convert.keras_norm_stats("norm", "model/bn").values()]
      ['model/bn/moving_mean', 'model/bn/moving_variance']
    """
    return {
        f"{path}/mean": Leaf(f"{name}/moving_mean"),
        f"{path}/var": Leaf(f"{name}/moving_variance"),
    }


def keras_embedding(path: str, name: str) -> dict[str, Leaf]:
    """Maps Flax's ``Embed`` to ``keras.layers.Embedding``.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.keras_embedding("embed", "model/tokens")["embed/embedding"].name
      'model/tokens/embeddings'
    """
    return {f"{path}/embedding": Leaf(f"{name}/embeddings")}


def _if(condition: bool, entries: dict[str, Leaf]) -> dict[str, Leaf]:
    return entries if condition else {}

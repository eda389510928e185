"""Ready-made mappings of the layers that Flax, PyTorch and Keras have in common.

Each gives the entries of a mapping for one layer, by its path in ours and its name in theirs; a
model's mapping is their union: ``torch_dense("fc1", "fc1") | torch_dense("fc2", "fc2")``.
"""

from collections.abc import Mapping
from types import MappingProxyType

from rmsprop_jax.convert._mapping import Leaf

# How the cells of Flax keep the gates i, f, g, o of a layer; None where one array has them all.
_GATES: Mapping[str, tuple[str, ...] | None] = MappingProxyType(
    {"linen": ("i", "f", "g", "o"), "nnx": ("i", "f_", "g", "o"), "nnx_optimized": None}
)


def torch_dense(path: str, name: str, *, bias: bool = True) -> dict[str, Leaf]:
    """Flax's ``Dense`` or ``Linear`` at a path, ``torch.nn.Linear`` of a name.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.torch_dense("fc1", "layers.0", bias=False)
      {'fc1/kernel': Leaf(name='layers.0.weight', axes=(1, 0), shape=None, part=None, also=())}
    """
    kernel = {f"{path}/kernel": Leaf(f"{name}.weight", (1, 0))}
    return kernel | _if(bias, {f"{path}/bias": Leaf(f"{name}.bias")})


def torch_dense_after_conv(
    path: str, name: str, image: tuple[int, int, int], *, bias: bool = True
) -> dict[str, Leaf]:
    """A ``Dense`` whose input is a flattened image of (height, width, channels).

    PyTorch flattens (channels, height, width), so that the rows of the kernel are in another
    order.

    Args:
      path: of Flax's layer.
      name: of ``torch.nn.Linear``.
      image: height, width and channels of what is flattened.
      bias: whether the layer has one.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.torch_dense_after_conv("fc", "fc", (4, 4, 16), bias=False)["fc/kernel"].axes
      (2, 3, 1, 0)
    """
    height, width, channels = image
    leaf = Leaf(f"{name}.weight", (2, 3, 1, 0), (-1, channels, height, width))
    return {f"{path}/kernel": leaf} | _if(bias, {f"{path}/bias": Leaf(f"{name}.bias")})


def torch_conv(path: str, name: str, *, dims: int = 2, bias: bool = True) -> dict[str, Leaf]:
    """Flax's ``Conv`` at a path, ``torch.nn.Conv1d``, ``Conv2d`` or ``Conv3d`` of a name.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.torch_conv("conv", "features.0", bias=False)["conv/kernel"].axes
      (2, 3, 1, 0)
    """
    kernel = {f"{path}/kernel": Leaf(f"{name}.weight", (*range(2, dims + 2), 1, 0))}
    return kernel | _if(bias, {f"{path}/bias": Leaf(f"{name}.bias")})


def torch_norm(path: str, name: str) -> dict[str, Leaf]:
    """Flax's ``BatchNorm``, ``LayerNorm`` or ``GroupNorm``, and PyTorch's of a name.

    Example:
      >>> from rmsprop_jax import convert
      >>> [leaf.name for leaf in convert.torch_norm("norm", "bn1").values()]
      ['bn1.weight', 'bn1.bias']
    """
    return {f"{path}/scale": Leaf(f"{name}.weight"), f"{path}/bias": Leaf(f"{name}.bias")}


def torch_norm_stats(path: str, name: str) -> dict[str, Leaf]:
    """The running statistics of Flax's ``BatchNorm``, and PyTorch's of a name.

    For :func:`params_from` on ``batch_stats`` or ``nnx.state(model, nnx.BatchStat)``, with the
    model's ``state_dict()``.

    In training the two move differently. PyTorch's momentum is the weight of the new batch, .1 if
    it is not set; that of ``linen.BatchNorm`` and ``nnx.BatchNorm`` is the weight of the past, .99
    if it is not set: for PyTorch's m give Flax 1 - m. And where a batch has n numbers in a channel,
    the variance that PyTorch adds is the unbiased one, n / (n - 1) times that of Flax.

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
    """Flax's ``Embed`` at a path, ``torch.nn.Embedding`` of a name.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.torch_embedding("embed", "tokens")["embed/embedding"].name
      'tokens.weight'
    """
    return {f"{path}/embedding": Leaf(f"{name}.weight")}


def torch_lstm(path: str, name: str, cell: str, *, layer: int = 0) -> dict[str, Leaf]:
    """An LSTM cell of Flax at a path, one layer of ``torch.nn.LSTM`` of a name.

    PyTorch adds two biases where Flax has one, so that there the sum moves twice as far in a step.
    To go on exactly, double the updates of ours: ``optax.chain(tx, optax.masked(optax.scale(2.0),
    is_bias_of_an_lstm))``. With weight decay the two cannot be made equal.

    Args:
      path: of the cell.
      name: of ``torch.nn.LSTM``.
      cell: "linen" for both cells of ``flax.linen``, "nnx" for ``nnx.LSTMCell`` or
        "nnx_optimized" for ``nnx.OptimizedLSTMCell``.
      layer: which layer of PyTorch's.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.torch_lstm("cell", "lstm", "linen")["cell/hf/bias"]
      Leaf(name='lstm.bias_hh_l0', axes=None, shape=None, part=(1, 4, 0), also=('lstm.bias_ih_l0',))
    """
    names = {kind: f"{name}.{kind}_l{layer}" for kind in ("weight_ih", "weight_hh", "bias_hh")}
    also = (f"{name}.bias_ih_l{layer}",)
    return _lstm(
        path,
        cell,
        Leaf(names["weight_ih"], (1, 0)),
        Leaf(names["weight_hh"], (1, 0)),
        Leaf(names["bias_hh"], also=also),
        axis=0,
    )


def keras_dense(path: str, name: str, *, bias: bool = True) -> dict[str, Leaf]:
    """Flax's ``Dense``, ``Linear`` or ``Conv`` at a path, Keras's of a name.

    Their kernels are laid out alike, but for Keras's depthwise and transposed convolutions.

    Example:
      >>> from rmsprop_jax import convert
      >>> [leaf.name for leaf in convert.keras_dense("fc1", "sequential/dense").values()]
      ['sequential/dense/kernel', 'sequential/dense/bias']
    """
    kernel = {f"{path}/kernel": Leaf(f"{name}/kernel")}
    return kernel | _if(bias, {f"{path}/bias": Leaf(f"{name}/bias")})


keras_conv = keras_dense


def keras_norm(path: str, name: str) -> dict[str, Leaf]:
    """Flax's ``BatchNorm``, ``LayerNorm`` or ``GroupNorm``, and Keras's of a name.

    Example:
      >>> from rmsprop_jax import convert
      >>> [leaf.name for leaf in convert.keras_norm("norm", "model/bn").values()]
      ['model/bn/gamma', 'model/bn/beta']
    """
    return {f"{path}/scale": Leaf(f"{name}/gamma"), f"{path}/bias": Leaf(f"{name}/beta")}


def keras_norm_stats(path: str, name: str) -> dict[str, Leaf]:
    """The running statistics of Flax's ``BatchNorm``, and Keras's of a name.

    For :func:`params_from` on ``batch_stats`` or ``nnx.state(model, nnx.BatchStat)``, with
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
    """Flax's ``Embed`` at a path, ``keras.layers.Embedding`` of a name.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.keras_embedding("embed", "model/tokens")["embed/embedding"].name
      'model/tokens/embeddings'
    """
    return {f"{path}/embedding": Leaf(f"{name}/embeddings")}


def keras_lstm(path: str, name: str, cell: str) -> dict[str, Leaf]:
    """An LSTM cell of Flax at a path, the cell of ``keras.layers.LSTM`` of a name.

    Args:
      path: of the cell.
      name: of Keras's cell, as in "sequential/lstm/lstm_cell".
      cell: "linen" for both cells of ``flax.linen``, "nnx" for ``nnx.LSTMCell`` or
        "nnx_optimized" for ``nnx.OptimizedLSTMCell``.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.keras_lstm("cell", "model/lstm/lstm_cell", "linen")["cell/ig/kernel"]
      Leaf(name='model/lstm/lstm_cell/kernel', axes=None, shape=None, part=(2, 4, 1), also=())
    """
    return _lstm(
        path,
        cell,
        Leaf(f"{name}/kernel"),
        Leaf(f"{name}/recurrent_kernel"),
        Leaf(f"{name}/bias"),
        axis=1,
    )


def _lstm(
    path: str, cell: str, inputs: Leaf, hidden: Leaf, bias: Leaf, *, axis: int
) -> dict[str, Leaf]:
    """All gates of a cell; axis is that of their kernels along which a framework has them."""
    if cell not in _GATES:
        raise ValueError(f"cell must be one of {sorted(_GATES)}, got {cell!r}")
    gates = _GATES[cell]
    if gates is None:
        return {
            f"{path}/dense_i/kernel": inputs,
            f"{path}/dense_h/kernel": hidden,
            f"{path}/dense_h/bias": bias,
        }
    mapping = {}
    for i, gate in enumerate(gates):
        mapping[f"{path}/i{gate}/kernel"] = inputs._replace(part=(i, 4, axis))
        mapping[f"{path}/h{gate.rstrip('_')}/kernel"] = hidden._replace(part=(i, 4, axis))
        mapping[f"{path}/h{gate.rstrip('_')}/bias"] = bias._replace(part=(i, 4, 0))
    return mapping


def _if(condition: bool, entries: dict[str, Leaf]) -> dict[str, Leaf]:
    return entries if condition else {}

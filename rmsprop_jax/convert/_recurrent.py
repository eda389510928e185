"""Ready-made mappings of recurrent cells."""

from collections.abc import Mapping
from types import MappingProxyType

from rmsprop_jax.convert._mapping import Leaf

# How the cells of Flax store the gates i, f, g, o of a layer; None if one array has them all.
_GATES: Mapping[str, tuple[str, ...] | None] = MappingProxyType(
    {"linen": ("i", "f", "g", "o"), "nnx": ("i", "f_", "g", "o"), "nnx_optimized": None}
)


def torch_lstm(path: str, name: str, cell: str, *, layer: int = 0) -> dict[str, Leaf]:
    """Maps an LSTM cell of Flax to one layer of ``torch.nn.LSTM``.

    PyTorch adds two biases where Flax has one, so their sum moves twice as far per step in PyTorch.
    To continue exactly, double the updates in JAX: ``optax.chain(tx, optax.masked(optax.scale(2.0),
    is_bias_of_an_lstm))``. With weight decay the two cannot be made equal.

    Args:
      path: path of the cell.
      name: name of ``torch.nn.LSTM``.
      cell: "linen" for both cells of ``flax.linen``, "nnx" for ``nnx.LSTMCell`` or
        "nnx_optimized" for ``nnx.OptimizedLSTMCell``.
      layer: which of PyTorch's layers.

    Example:
      >>> from rmsprop_jax import convert
      >>> leaf = convert.torch_lstm("cell", "lstm", "linen")["cell/hf/bias"]
      >>> leaf.names(), leaf.part
      (('lstm.bias_hh_l0', 'lstm.bias_ih_l0'), (1, 4, 0))
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


def torch_gru(path: str, name: str, cell: str, *, layer: int = 0) -> dict[str, Leaf]:
    """Maps a GRU cell of Flax to one layer of ``torch.nn.GRU`` with biases.

    For its gates r and z, ``linen.GRUCell`` has one bias where PyTorch adds two; for n it has two.
    To continue exactly, double the updates of the former: ``optax.chain(tx,
    optax.masked(optax.scale(2.0), is_ir_or_iz_bias))``. With weight decay the two cannot be made
    equal.

    ``nnx.GRUCell`` has no bias in its recurrent layer, so it cannot compute what PyTorch's does.
    Give it one, ``cell.dense_h = nnx.Linear(features, 3 * features, rngs=rngs)``. Then all biases
    exist, and nothing has to be doubled.

    Args:
      path: path of the cell.
      name: name of ``torch.nn.GRU``.
      cell: "linen" for ``linen.GRUCell``, "nnx" for ``nnx.GRUCell`` with that bias.
      layer: which of PyTorch's layers.

    Example:
      >>> from rmsprop_jax import convert
      >>> mapping = convert.torch_gru("cell", "gru", "linen")
      >>> mapping["cell/ir/bias"].names(), mapping["cell/hn/bias"].names()
      (('gru.bias_ih_l0', 'gru.bias_hh_l0'), ('gru.bias_hh_l0',))
    """
    inputs = Leaf(f"{name}.weight_ih_l{layer}", (1, 0))
    hidden = Leaf(f"{name}.weight_hh_l{layer}", (1, 0))
    biases = Leaf(f"{name}.bias_ih_l{layer}"), Leaf(f"{name}.bias_hh_l{layer}")
    if cell == "nnx":
        return {
            f"{path}/dense_i/kernel": inputs,
            f"{path}/dense_i/bias": biases[0],
            f"{path}/dense_h/kernel": hidden,
            f"{path}/dense_h/bias": biases[1],
        }
    if cell != "linen":
        raise ValueError(f"cell must be one of ['linen', 'nnx'], got {cell!r}")
    parts = {gate: [(i, 3, 0)] * 2 for i, gate in enumerate("rzn")}
    return _gru(path, inputs, hidden, biases, parts, axis=0)


def keras_lstm(path: str, name: str, cell: str) -> dict[str, Leaf]:
    """Maps an LSTM cell of Flax to the cell of ``keras.layers.LSTM``.

    Args:
      path: path of the cell.
      name: name of Keras's cell, such as "sequential/lstm/lstm_cell".
      cell: "linen" for both cells of ``flax.linen``, "nnx" for ``nnx.LSTMCell`` or
        "nnx_optimized" for ``nnx.OptimizedLSTMCell``.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.keras_lstm("cell", "model/lstm/lstm_cell", "linen")["cell/ig/kernel"].part
      (2, 4, 1)
    """
    return _lstm(
        path,
        cell,
        Leaf(f"{name}/kernel"),
        Leaf(f"{name}/recurrent_kernel"),
        Leaf(f"{name}/bias"),
        axis=1,
    )


def keras_gru(path: str, name: str, cell: str) -> dict[str, Leaf]:
    """Maps ``linen.GRUCell`` to the cell of ``keras.layers.GRU``.

    Keras's cell must have biases and ``reset_after=True``, its defaults. For its gates r and z it
    adds two biases where Flax has one: to continue exactly, double the updates in JAX, as in
    :func:`torch_gru`.

    Args:
      path: path of the cell.
      name: name of Keras's cell, such as "sequential/gru/gru_cell".
      cell: "linen". ``nnx.GRUCell`` has the gates of a layer in one array, in another order.

    Example:
      >>> from rmsprop_jax import convert
      >>> convert.keras_gru("cell", "model/gru/gru_cell", "linen")["cell/ir/kernel"].part
      (1, 3, 1)
    """
    if cell != "linen":
        raise ValueError(f"cell must be 'linen', got {cell!r}")
    # The bias is (2, 3 * units): z, r, n of the input, then those of the hidden state.
    bias = Leaf(f"{name}/bias", shape=(6, -1), original=(2, -1))
    parts = {gate: [(i, 6, 0), (i + 3, 6, 0)] for i, gate in enumerate("zrn")}
    kernels = Leaf(f"{name}/kernel"), Leaf(f"{name}/recurrent_kernel")
    return _gru(path, *kernels, (bias, bias), parts, axis=1)


def _lstm(
    path: str, cell: str, inputs: Leaf, hidden: Leaf, bias: Leaf, *, axis: int
) -> dict[str, Leaf]:
    """All gates of a cell. axis is the kernel axis along which a framework stores them."""
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


def _gru(
    path: str,
    inputs: Leaf,
    hidden: Leaf,
    biases: tuple[Leaf, Leaf],
    parts: Mapping[str, list[tuple[int, int, int]]],
    *,
    axis: int,
) -> dict[str, Leaf]:
    """All gates of a linen cell.

    parts are the parts of the two biases for each gate, in the framework's order. axis is the
    kernel axis along which the framework stores the gates.
    """
    mapping = {}
    for i, (gate, of_biases) in enumerate(parts.items()):
        mapping[f"{path}/i{gate}/kernel"] = inputs._replace(part=(i, 3, axis))
        mapping[f"{path}/h{gate}/kernel"] = hidden._replace(part=(i, 3, axis))
        first, second = (
            bias._replace(part=part) for bias, part in zip(biases, of_biases, strict=True)
        )
        if gate == "n":  # its hidden part is scaled by r
            mapping |= {f"{path}/in/bias": first, f"{path}/hn/bias": second}
        else:
            mapping[f"{path}/i{gate}/bias"] = first._replace(also=(second,))
    return mapping

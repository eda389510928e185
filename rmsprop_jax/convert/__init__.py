"""Conversion of optimizer states from and to PyTorch, timm, Keras, TensorFlow 1 and Optax.

    mapping = convert.torch_dense("fc1", "fc1") | convert.torch_dense("fc2", "fc2")
    tx = dialects.pytorch(lr=1e-2, momentum=0.9)
    state = convert.from_pytorch(state_dict, params, mapping, tx, names=names)

Each ``from_`` function returns the state with which a transformation of this library continues, and
each ``to_`` function the state with which the framework continues. Differences in what the numbers
mean are converted, too. No framework is imported: the functions work on arrays, tensors and
mappings; :func:`keras_file` reads files.

A mapping says for each leaf of the parameters where the framework keeps it: its name or number if
the layout is the same, or a :class:`Leaf`. There are ready-made mappings for the usual layers. A
leaf for which tx keeps no state, because ``optax.partition`` or ``optax.masked`` freezes it, needs
no entry; if it has one, the framework's state for it is ignored.

Plain states, and buffers that are not rescaled, are bit-identical after a round trip. A variance s
becomes the second moment s + m^2 and back with one rounding each to the precision of the state. A
second moment below m^2, which frameworks reach by cancellation, becomes a variance of 0. A rescaled
buffer is rounded once; with bias correction there are two roundings. Slots in fewer bits are
returned as float32, and lose on the way back what :func:`change_storage` describes. Numbers that no
gradients can produce are refused: those that are not finite, and second moments below 0.
"""

from rmsprop_jax.convert._attention import keras_attention, torch_attention
from rmsprop_jax.convert._bitsandbytes import bitsandbytes_state_dict
from rmsprop_jax.convert._change_storage import change_storage
from rmsprop_jax.convert._groups import pytorch_options, timm_options
from rmsprop_jax.convert._keras import from_keras, to_keras
from rmsprop_jax.convert._keras_file import KerasFile, keras_file
from rmsprop_jax.convert._keras_options import keras_options
from rmsprop_jax.convert._layers import (
    keras_conv,
    keras_dense,
    keras_embedding,
    keras_norm,
    keras_norm_stats,
    torch_conv,
    torch_dense,
    torch_dense_after_conv,
    torch_embedding,
    torch_norm,
    torch_norm_stats,
)
from rmsprop_jax.convert._mapping import Leaf
from rmsprop_jax.convert._optax import from_optax, to_optax
from rmsprop_jax.convert._params import params_from, params_to
from rmsprop_jax.convert._recurrent import keras_gru, keras_lstm, torch_gru, torch_lstm
from rmsprop_jax.convert._tensorflow import (
    from_tensorflow_v1,
    tensorflow_v1_slots,
    to_tensorflow_v1,
)
from rmsprop_jax.convert._torch import (
    from_pytorch,
    from_timm,
    to_pytorch,
    to_timm,
)

__all__ = [
    "KerasFile",
    "Leaf",
    "bitsandbytes_state_dict",
    "change_storage",
    "from_keras",
    "from_optax",
    "from_pytorch",
    "from_tensorflow_v1",
    "from_timm",
    "keras_attention",
    "keras_conv",
    "keras_dense",
    "keras_embedding",
    "keras_file",
    "keras_gru",
    "keras_lstm",
    "keras_norm",
    "keras_norm_stats",
    "keras_options",
    "params_from",
    "params_to",
    "pytorch_options",
    "tensorflow_v1_slots",
    "timm_options",
    "to_keras",
    "to_optax",
    "to_pytorch",
    "to_tensorflow_v1",
    "to_timm",
    "torch_attention",
    "torch_conv",
    "torch_dense",
    "torch_dense_after_conv",
    "torch_embedding",
    "torch_gru",
    "torch_lstm",
    "torch_norm",
    "torch_norm_stats",
]

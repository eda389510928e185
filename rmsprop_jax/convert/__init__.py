"""Checkpoints that move: optimizer states from and to PyTorch, timm, Keras, TensorFlow 1 and Optax.

    mapping = convert.torch_dense("fc1", "fc1") | convert.torch_dense("fc2", "fc2")
    tx = dialects.pytorch(lr=1e-2, momentum=0.9)
    state = convert.from_pytorch(state_dict, params, mapping, tx, names=names)

Each ``from_`` gives the state with which a transformation of this library goes on, each ``to_`` the
state with which the framework does; what the framework means by its numbers is converted, too. No
framework is imported: they work on arrays, tensors and mappings; :func:`keras_file` reads files.

A mapping says for each leaf of the parameters where the framework has it: its name or number if it
is laid out alike, or a :class:`Leaf`. There are ready-made ones for the usual layers. A leaf that
tx keeps no state for, as ``optax.partition`` and ``optax.masked`` freeze it, needs no entry; it may
have one, and what the framework remembers of it is then left alone.

Plain states, and buffers that are not rescaled, come back bit for bit. A variance s becomes the
second moment s + m^2 and back with one rounding each to the precision of the state, and a second
moment below m^2, which frameworks reach by cancellation, becomes a variance of 0. A rescaled buffer
is rounded once; under bias correction there are two roundings. Slots in fewer bits are given as
float32, and lose what :func:`change_storage` says on the way back. What no gradients leave behind
is refused: numbers that are not finite, and second moments below 0.
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

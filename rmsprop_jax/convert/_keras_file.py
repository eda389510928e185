"""Reads files that Keras has saved, without Keras."""

from collections.abc import Mapping
import io
import json
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple
import zipfile

import numpy as np

from rmsprop_jax.convert._arrays import array

_WEIGHTS, _CONFIG = "model.weights.h5", "config.json"  # in a .keras file
_OPTIMIZER = "optimizer/vars/"
_NOT_OF_THE_MODEL = ("optimizer/", "metrics/")


class KerasFile(NamedTuple):
    """The content of a file, as :func:`keras_file` returns it.

    Attributes:
      weights: those of the layers by name, including untrained ones such as moving means.
      variables: those of the optimizer, as :func:`from_keras` takes them; empty if there are none.
      config: that of the optimizer, as :func:`keras_options` takes it; None if there is none.
    """

    weights: dict[str, np.ndarray]
    variables: dict[str, np.ndarray]
    config: dict[str, Any] | None


def keras_file(path: str | PathLike[str]) -> KerasFile:
    """Reads weights, optimizer variables and optimizer config from a Keras file, without Keras.

    This needs h5py, which is not a dependency of this library: ``pip install h5py``.

    Weights have the names that they have in the file. In a ``.weights.h5`` or ``.keras`` file,
    these say how a layer is reached and which of its variables it is: "layers/dense_1/vars/0" is
    the kernel of the second Dense of a Sequential or functional model, whatever its name, and
    "layers/dense_1/vars/1" its bias; variables are in the order of ``layer.weights``. In an ``.h5``
    file, they are paths of variables, such as "net/fc2/kernel", as in the ready-made mappings. A
    mapping uses the names unchanged. If the file holds more than a mapping names, select what is
    needed: ``params_from({name: weights[name] for name in names}, ...)``.

    Optimizer variables are named by their paths in an ``.h5`` file, and "0", "1", ... in the
    others, which do not say to which weight they belong: the names argument of :func:`from_keras`
    is then that of the trained weights, layer by layer in the model's order.

    With ``use_ema``, ``model.fit`` ends by copying the averages into the model, so a file saved
    afterwards has the averages as its weights.

    Args:
      path: path of a ``.weights.h5`` file, as ``model.save_weights`` writes; or of a ``.keras`` or
        ``.h5`` file, as ``model.save`` does.

    Returns:
      A :class:`KerasFile`.

    Raises:
      ImportError: if h5py is not installed.
      FileNotFoundError: if there is no such file.
      ValueError: if it is not such a file.
    """
    try:
        import h5py
    except ImportError:
        raise ImportError("keras_file reads HDF5, which needs h5py: pip install h5py") from None
    if not zipfile.is_zipfile(path):
        if not Path(path).is_file():
            raise FileNotFoundError(f"path must be a file, got {str(path)!r}")
        if not h5py.is_hdf5(path):
            raise ValueError(f"path must be a .keras, .weights.h5 or .h5 file, got {str(path)!r}")
        with h5py.File(path, "r") as file:
            return _of_model(file) if "layer_names" in _weights_of(file).attrs else _numbered(file)
    with zipfile.ZipFile(path) as archive:
        if missing := sorted({_WEIGHTS, _CONFIG} - set(archive.namelist())):
            raise ValueError(f"path must be a .keras file, got {str(path)!r} without {missing}")
        compiled = json.loads(archive.read(_CONFIG)).get("compile_config") or {}
        with h5py.File(io.BytesIO(archive.read(_WEIGHTS)), "r") as file:
            return _numbered(file)._replace(config=compiled.get("optimizer"))


def _numbered(file: Any) -> KerasFile:
    """Reads a file whose variables have numbers."""
    found: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if hasattr(item, "shape"):
            found[name] = array(item[()])

    file.visititems(visit)
    weights = {name: a for name, a in found.items() if not name.startswith(_NOT_OF_THE_MODEL)}
    numbers = sorted(int(n.removeprefix(_OPTIMIZER)) for n in found if n.startswith(_OPTIMIZER))
    return KerasFile(weights, {str(i): found[f"{_OPTIMIZER}{i}"] for i in numbers}, None)


def _of_model(file: Any) -> KerasFile:
    """Reads a file whose variables have paths, layer by layer."""
    root = _weights_of(file)
    layers = [*_texts(root.attrs, "layer_names"), "top_level_model_weights"]
    weights: dict[str, np.ndarray] = {}
    for layer in layers:
        for name, value in _ordered(root[layer]).items() if layer in root else ():
            weights.setdefault(name, value)
    variables = _ordered(file["optimizer_weights"]) if "optimizer_weights" in file else {}
    training = json.loads(_text(file.attrs.get("training_config", "{}")))
    return KerasFile(weights, variables, training.get("optimizer_config"))


def _weights_of(file: Any) -> Any:
    return file.get("model_weights", file)


def _ordered(group: Any) -> dict[str, np.ndarray]:
    """The arrays of a group by name, in the order that the group gives."""
    return {name: array(group[name][()]) for name in _texts(group.attrs, "weight_names")}


def _texts(attributes: Mapping[str, Any], name: str) -> list[str]:
    """A list of texts in attributes: a single attribute, or several numbered ones if it is long."""
    if name in attributes:
        return [_text(text) for text in attributes[name]]
    found: list[str] = []
    for i in range(len(attributes)):
        found += [_text(text) for text in attributes.get(f"{name}{i}", ())]
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

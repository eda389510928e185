"""HDF5 files as plain trees, and a stand-in for h5py that reads such trees."""

import json
from pathlib import Path
import types

import numpy as np

NOT_KEPT = ("model_config",)  # of attributes: long, and nothing of it is read


def tree_of(group):
    """A group of h5py as {"attrs": ..., "items": ...}, of what JSON has and arrays."""
    attributes = {
        key: [str(v) for v in value] if isinstance(value, np.ndarray) else str(value)
        for key, value in group.attrs.items()
        if key not in NOT_KEPT
    }
    items = {
        key: item[()] if hasattr(item, "shape") else tree_of(item) for key, item in group.items()
    }
    return {"attrs": attributes, "items": items}


class Group:
    """What keras_file uses of a group, or of a file."""

    def __init__(self, tree):
        self.tree, self.attrs = tree, tree["attrs"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __contains__(self, name):
        return self.get(name, None) is not None

    def __getitem__(self, name):
        item = self.tree
        for part in name.split("/"):
            item = item["items"][part]
        return Group(item) if isinstance(item, dict) else Dataset(item)

    def get(self, name, default):
        try:
            return self[name]
        except KeyError:
            return default

    def visititems(self, visit, before=""):
        for name in sorted(self.tree["items"]):  # as HDF5 has them
            visit(before + name, item := self[name])
            if isinstance(item, Group):
                item.visititems(visit, f"{before}{name}/")


class Dataset:
    """What keras_file uses of a dataset."""

    def __init__(self, value):
        self.value, self.shape = np.asarray(value), np.shape(value)

    def __getitem__(self, index):
        return self.value[index]


def stand_in(decode):
    """A module in the place of h5py, to which a file is a tree in JSON that decode reads."""

    def tree(file):
        text = file.read() if hasattr(file, "read") else Path(file).read_bytes()
        return decode(json.loads(text))

    def is_hdf5(file):
        return Path(file).read_bytes()[:1] == b"{"

    return types.SimpleNamespace(File=lambda file, mode: Group(tree(file)), is_hdf5=is_hdf5)

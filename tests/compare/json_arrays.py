"""Trees of arrays in JSON: an array becomes its dtype and its values."""

import numpy as np


def mapped(tree, f):
    """A tree with f of all that is no dict or list; an encoded array is none."""
    if isinstance(tree, dict) and "dtype" not in tree:
        return {key: mapped(value, f) for key, value in tree.items()}
    return [mapped(value, f) for value in tree] if isinstance(tree, list) else f(tree)


def encoded(tree):
    return mapped(
        tree,
        lambda value: (
            {"dtype": value.dtype.name, "values": value.tolist()}
            if hasattr(value, "dtype")
            else value
        ),
    )


def decoded(tree):
    return mapped(
        tree,
        lambda value: (
            np.array(value["values"], value["dtype"]) if isinstance(value, dict) else value
        ),
    )


def by_numbers(tree):
    """The tree with numbers for keys that are digits, which JSON has not."""
    if isinstance(tree, dict):
        return {int(k) if k.isdigit() else k: by_numbers(value) for k, value in tree.items()}
    return [by_numbers(value) for value in tree] if isinstance(tree, list) else tree

"""Arrays of every framework as NumPy's."""

from typing import Any

import numpy as np


def array(value: Any) -> np.ndarray:
    """A tensor of PyTorch, on any device, or of another framework, or an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point() and value.dtype.itemsize < 4:
            value = value.float()  # NumPy has no bfloat16
    return np.asarray(value)

"""Arrays of every framework as NumPy's."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def array(value: Any) -> np.ndarray:
    """A tensor of PyTorch, on any device, or of another framework, or an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point() and value.dtype.itemsize < 4:
            value = value.float()  # NumPy has no bfloat16
    value = np.asarray(value)
    # What bfloat16 is to NumPy and h5py when it comes from a file.
    return value.view(jnp.bfloat16) if value.dtype == np.dtype("V2") else value

"""Arrays of every framework, converted to NumPy's and to ours."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmsprop_jax._storage import Slot, is_packed


def array(value: Any, what: str = "an array") -> np.ndarray:
    """A NumPy array from an array, or from a tensor of PyTorch (on any device) or another
    framework.

    Raises:
      ValueError: if its values are not in this process; what is its name in the error.
    """
    if getattr(value, "is_meta", False):
        raise ValueError(
            f"{what} is on PyTorch's meta device, which keeps no numbers: load the real ones, as "
            "torch.load(path, map_location='cpu', weights_only=True) does"
        )
    if hasattr(value, "full_tensor"):  # of a DTensor
        raise ValueError(
            f"{what} is spread over several processes: save whole tensors, as "
            "StateDictOptions(full_state_dict=True) asks for"
        )
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point() and value.dtype.itemsize < 4:
            value = value.float()  # NumPy has no bfloat16
    value = np.asarray(value)
    # The dtype that NumPy and h5py give to bfloat16 read from a file.
    return value.view(jnp.bfloat16) if value.dtype == np.dtype("V2") else value


def place(old: Any, value: Any) -> Any:
    """A copy of value as an array or slot like old, with its placement and commitment."""
    if is_packed(old):
        return jax.tree.map(place, old, old.encode(value))
    value = np.asarray(value).astype(old.dtype)
    if not isinstance(old, jax.Array):
        return value
    return jax.device_put(value, old.sharding) if old.committed else jnp.asarray(value)


def wide(value: Any) -> np.ndarray:
    """An array, or the values of a slot, in double precision."""
    value = np.asarray(value.decode() if is_packed(value) else value)
    return value.astype(np.result_type(value.dtype, np.float64))


def narrow(value: np.ndarray, like: Slot) -> np.ndarray:
    """The array in the dtype of a slot, or in float32 if that has fewer bits."""
    return value.astype(np.promote_types(like.dtype, np.float32))


def square(m: np.ndarray, *, complex_parts: bool) -> np.ndarray:
    """|m|^2, or the squares of the real and of the imaginary part."""
    return by_parts(np.square, m) if complex_parts else np.square(m.real) + np.square(m.imag)


def by_parts(f: Callable[[np.ndarray], np.ndarray], z: np.ndarray) -> np.ndarray:
    """The value of f on a real array; on both parts if it is complex."""
    return f(z.real) + 1j * f(z.imag) if np.iscomplexobj(z) else f(z)

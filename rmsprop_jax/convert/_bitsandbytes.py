"""The ``state_dict()`` of bitsandbytes' RMSprop, in the form of PyTorch's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rmsprop_jax.convert._arrays import array
from rmsprop_jax.convert._groups import Group, check_state_dict

_HELD = "__bnb_optimizer_quant_state__"  # instead of slots, since version 0.44
_BLOCK = 256  # elements of the flat array that share one maximum


def bitsandbytes_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the state of bitsandbytes' ``RMSprop`` (32 or 8 bits) to that of PyTorch's.

    Both follow the same rule, except that bitsandbytes has neither momentum nor a centered form: it
    accepts ``momentum`` and ignores it. A second moment in 8 bits is a number from a table, times
    the largest second moment in its block of 256:

        s = qmap1[state1] absmax1

    Args:
      state_dict: that of ``bitsandbytes.optim.RMSprop``, ``RMSprop32bit`` or ``RMSprop8bit``:
        ``optimizer.state_dict()`` or a file of it.

    Returns:
      A state_dict for :func:`from_pytorch`, with groups for :func:`pytorch_options`.

    Raises:
      ValueError: if it is from another optimizer, or in 8 bits without blocks.

    Example:
      >>> from rmsprop_jax import convert
      >>> group = {"lr": 0.01, "betas": (0.99, 0), "eps": 1e-8, "weight_decay": 0, "params": [0]}
      >>> held = {"state1": [0, 255], "qmap1": [0.0] * 255 + [1.0], "absmax1": [4.0]}
      >>> saved = {"state": {0: {"step": 5} | held}, "param_groups": [group]}
      >>> convert.bitsandbytes_state_dict(saved)["state"][0]["square_avg"]
      array([0., 4.])

    Source: bitsandbytes/optim/optimizer.py and rmsprop.py, version 0.50.
    """
    check_state_dict(state_dict)
    return {
        "state": {
            number: _slots(slots, f"state[{number!r}]")
            for number, slots in state_dict["state"].items()
        },
        "param_groups": [_group(group) for group in state_dict["param_groups"]],
    }


def _slots(slots: Mapping[str, Any], what: str) -> dict[str, Any]:
    held = {**slots, **slots.get(_HELD, {})}
    held.pop(_HELD, None)
    wanted = {"step", "state1"}
    if set(held) not in (wanted, wanted | {"qmap1", "absmax1"}):
        raise ValueError(
            f"{what} must have 'step' and 'state1' and, in 8 bits, 'qmap1' and 'absmax1', as "
            f"bitsandbytes' RMSprop has, got {sorted(held)}"
        )
    arrays = {name: array(value, f"{what}[{name!r}]") for name, value in held.items()}
    value = arrays["state1"]
    if "qmap1" in arrays:
        largest = np.repeat(arrays["absmax1"], _BLOCK)[: value.size]
        if largest.size != value.size:
            raise ValueError(
                f"{what} has {arrays['absmax1'].size} elements in 'absmax1' for {value.size} in "
                f"blocks of {_BLOCK}"
            )
        value = arrays["qmap1"][value] * largest.reshape(value.shape)
    elif not np.issubdtype(value.dtype, np.floating):
        raise ValueError(f"{what} has 'state1' in {value.dtype}, and no 'qmap1'")
    return {"step": held["step"], "square_avg": value}


def _group(group: Group) -> dict[str, Any]:
    alpha, other = group.get("betas", (0, 0))
    if alpha == 0 or other != 0:
        raise ValueError(
            f"a group of bitsandbytes' RMSprop has betas of (alpha, 0), got {group.get('betas')}: "
            "it is from another optimizer"
        )
    kept = {name: value for name, value in group.items() if name != "betas"}
    return kept | {"alpha": alpha, "momentum": 0.0, "centered": False}

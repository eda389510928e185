"""The flattened form of PyTorch's optimizer states, with one key per slot and per option."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmsprop_jax.convert._groups import Group

_STATE, _GROUPS = "state.", "param_groups."


def is_flattened(state_dict: Any) -> bool:
    """Whether it was made with ``StateDictOptions(flatten_optimizer_state_dict=True)``."""
    return isinstance(state_dict, Mapping) and any(
        str(key).startswith((_STATE, _GROUPS)) for key in state_dict
    )


def nested(flattened: Mapping[str, Any], argument: str) -> dict[str, Any]:
    """The ``state_dict`` of a flattened one, with one group for each parameter."""
    state: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flattened.items():
        if key.startswith(_STATE):
            name, _, slot = key.removeprefix(_STATE).rpartition(".")
            state.setdefault(name, {})[slot] = value
        elif key.startswith(_GROUPS):
            name, _, option = key.removeprefix(_GROUPS).rpartition(".")
            groups.setdefault(name, {})[option] = value
        else:
            raise ValueError(
                f"{argument} has {key!r}: a flattened state must have only keys like "
                "'state.fc.weight.step' and 'param_groups.fc.weight.lr'"
            )
    return {
        "state": state,
        "param_groups": [group | {"params": [name]} for name, group in groups.items()],
    }


def flattened(state: Mapping[Any, Any], groups: Sequence[Group]) -> dict[str, Any]:
    """The inverse of :func:`nested`."""
    found: dict[str, Any] = {}
    for name, slots in state.items():
        found |= {f"{_STATE}{name}.{slot}": value for slot, value in slots.items()}
    for group in groups:
        (name,) = group["params"]
        found |= {f"{_GROUPS}{name}.{key}": v for key, v in group.items() if key != "params"}
    return found

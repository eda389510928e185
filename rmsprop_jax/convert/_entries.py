"""The state that PyTorch's RMSprop and timm's RMSpropTF keep for one parameter."""

from collections.abc import Collection, Mapping
from typing import Any

from rmsprop_jax._rule import Rule
from rmsprop_jax.convert._arrays import array
from rmsprop_jax.convert._foreign import Entry

SLOTS = {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"}
_MAY_BE_LEFT = ("grad_avg", "momentum_buffer")


def check_ignore(ignore: Collection[str]) -> None:
    """Refuses anything but slots that a group may leave unused."""
    if isinstance(ignore, str) or not set(ignore) <= set(_MAY_BE_LEFT):
        raise ValueError(f"ignore must be of {_MAY_BE_LEFT}, as {_MAY_BE_LEFT[1:]}, got {ignore!r}")


def check_slots(slots: Collection[str], what: str, rule: Rule) -> None:
    """Refuses slots other than those of a rule."""
    wanted = ["square_avg", "step", *_used(rule)]
    if set(slots) != set(wanted):
        raise ValueError(f"{what} has {sorted(slots)}, but its group needs {sorted(wanted)}")


def entry_of(
    slots: Mapping[str, Any], what: str, rule: Rule, ignore: Collection[str]
) -> tuple[Entry, int]:
    """The entry of a parameter, without unused slots that are to be ignored, and its steps."""
    left = tuple(slot for slot in _MAY_BE_LEFT if slot in slots and slot not in _used(rule))
    slots_in_use = {slot: value for slot, value in slots.items() if slot not in left}
    check_slots(slots_in_use, what, rule)
    if set(left) - set(ignore):
        raise ValueError(
            f"{what} has {list(left)} left over, which its group does not use (momentum, centered "
            f"or both are off): to continue without, convert with ignore={left}"
        )
    arrays = {slot: array(value, f"{what}[{slot!r}]") for slot, value in slots_in_use.items()}
    step = arrays["step"]
    if step.size != 1 or not float(step.item()).is_integer() or step.item() < 0:
        raise ValueError(f"{what}['step'] must be how many steps were taken, got {step}")
    entry = Entry(**{field: arrays[slot] for field, slot in SLOTS.items() if slot in arrays})
    return entry, int(step.item())


def _used(rule: Rule) -> list[str]:
    """The optional slots that a rule uses."""
    used = {"grad_avg": rule.variant.centered, "momentum_buffer": rule.hyper.momentum is not None}
    return [slot for slot in _MAY_BE_LEFT if used[slot]]

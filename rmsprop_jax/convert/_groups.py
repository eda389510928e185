"""The ``param_groups`` of PyTorch and timm, and the rule that they follow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import ShapeDtypeStruct

from rmsprop_jax import dialects
from rmsprop_jax._rule import Rule

Group = Mapping[str, Any]

# The options that a group of an early version lacks, and their meaning then.
_PYTORCH = {"momentum": 0.0, "centered": False, "maximize": False}
_TIMM = {
    "momentum": 0.0,
    "centered": False,
    "decoupled_decay": False,
    "corrected_weight_decay": False,
    "lr_in_momentum": True,
    "caution": False,
}


def check_state_dict(state_dict: Any) -> None:
    """Refuses anything but the ``state_dict()`` of an optimizer."""
    for key in ("state", "param_groups"):
        if not isinstance(state_dict, Mapping) or key not in state_dict:
            raise ValueError(f"state_dict has no {key!r}: it is not an optimizer's state_dict()")


def pytorch_options(group: Group) -> dict[str, Any]:
    """Returns the arguments of ``dialects.pytorch`` for one of ``state_dict["param_groups"]``.

    The learning rate is the current one of the group. A flattened state has a group for each
    parameter: ``{key.rpartition(".")[2]: value for key, value in state_dict.items() if
    key.startswith("param_groups.fc.weight.")}``.

    Raises:
      ValueError: if the group does not belong to ``torch.optim.RMSprop``.
    """
    if "decoupled_decay" in group:
        raise ValueError("group has 'decoupled_decay': it is from timm's RMSpropTF")
    return _options(group, _PYTORCH)


def timm_options(group: Group) -> dict[str, Any]:
    """Returns the arguments of ``dialects.timm`` for one of ``state_dict["param_groups"]``.

    The learning rate is the current one of the group.

    Raises:
      ValueError: if the group does not belong to timm's ``RMSpropTF``.
    """
    if "decoupled_decay" not in group:
        raise ValueError("group has no 'decoupled_decay': it is not from timm's RMSpropTF")
    options = _options(group, _TIMM)
    if options["corrected_weight_decay"]:
        options["initial_lr"] = _number(group, "max_lr_snapshot")
    return options


def pytorch_rule(group: Group) -> Rule:
    return dialects.pytorch(**pytorch_options(group)).part


def timm_rule(group: Group) -> Rule:
    return dialects.timm(**timm_options(group)).part


def _options(group: Group, later: Mapping[str, Any]) -> dict[str, Any]:
    first = {name: _number(group, name) for name in ("lr", "alpha", "eps", "weight_decay")}
    return first | {n: _number(group, n) if n in group else value for n, value in later.items()}


def _number(group: Group, name: str) -> float | bool | None:
    if name not in group:
        whose = "from bitsandbytes (see bitsandbytes_state_dict), or " if "betas" in group else ""
        raise ValueError(f"group has no {name!r}: it is {whose}from another optimizer or version")
    value = group[name]
    return value if value is None or isinstance(value, bool) else float(value)


def check_rules(
    groups: Sequence[Group], ours: Sequence[Rule], rule_of: Callable[[Group], Rule]
) -> None:
    """Refuses groups that follow a different rule than a transformation."""
    switches = [_switches(rule) for rule in ours]
    for index, rule in enumerate(map(rule_of, groups)):
        if _switches(rule) not in switches:
            differ = {n: v for n, v in _switches(rule).items() if all(o[n] != v for o in switches)}
            raise ValueError(
                f"param_groups[{index}] has {differ or _switches(rule)}, but tx does not: "
                f"build tx with these, or convert with strict=False{static_args(ours)}"
            )


def static_args(rules: Sequence[Rule]) -> str:
    """What an error adds if a 0 that stands for an absent term may have become an array."""
    for name in ("momentum", "weight_decay"):
        if any(isinstance(getattr(rule.hyper, name), ShapeDtypeStruct) for rule in rules):
            return f"; optax.inject_hyperparams leaves {name} alone if static_args names it"
    return ""


def lr_in_momentum(groups: Sequence[Group], rule_of: Callable[[Group], Rule]) -> bool:
    """Whether the buffers of groups contain the learning rate."""
    theirs = [rule_of(group) for group in groups]
    inside = {rule.variant.lr_in_momentum for rule in theirs if rule.hyper.momentum is not None}
    if len(inside) > 1:
        raise ValueError("param_groups differ in lr_in_momentum: convert each separately")
    return inside.pop() if inside else False


def _switches(rule: Rule) -> dict[str, Any]:
    """What a conversion cannot adapt in a rule, except its numbers."""
    variant, hyper = rule.variant, rule.hyper
    return {
        "centered": rule.variant.centered,
        "momentum": hyper.momentum is not None,
        "weight_decay": hyper.weight_decay is not None,
        "decoupled_weight_decay": variant.decoupled_weight_decay,
        "eps_in_sqrt": variant.eps_in_sqrt,
        "nesterov": variant.nesterov,
        "cautious": variant.cautious,
        "maximize": variant.maximize,
    }
